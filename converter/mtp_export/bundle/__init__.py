"""What a bundle has besides its graphs: manifest, container, metadata, chat template."""
