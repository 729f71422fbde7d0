"""What an export chooses by measuring: settings, formats under a size, rounding."""
