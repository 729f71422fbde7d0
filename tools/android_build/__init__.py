"""Kotlin compiled and tested without Gradle or Android's SDK, with what npm and Debian carry of them."""
