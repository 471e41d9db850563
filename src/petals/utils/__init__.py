"""Import paths of the original that scripts use; each module names what is elsewhere today.

New code imports from `petals`. Contains nothing else.
"""
