"""What tests and tools need beside Python packages: fetched from package registries, kept outside the working tree."""
