"""What an exported student consists of: its weights by other names, a card, and code that needs no xlstm."""
