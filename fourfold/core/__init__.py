"""The ground floor: types every other part shares. Imports nothing else of fourfold."""
