"""What commands share: options, console output, chat answers, the block map.

Knows no command.
"""
