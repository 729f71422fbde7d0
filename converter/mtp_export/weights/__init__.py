"""Parameters of graphs: where they come from, and how they are quantised."""
