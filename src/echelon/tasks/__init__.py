"""Tasks for teams of language models: what they are asked, and what their joint answer is worth."""
