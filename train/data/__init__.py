"""Generated conversations: one file a skill, seeded, split into what is trained on and what is not."""
