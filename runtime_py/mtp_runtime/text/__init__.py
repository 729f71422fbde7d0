"""Text to tokens and back, chats and conversations."""
