"""``mmrec serve``: the model behind an OpenAI-compatible endpoint, with named memories, and a page to type in."""
