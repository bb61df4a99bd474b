"""Where sequence state lives: row formats, pages, slots. Siblings of model/ and weights/."""
