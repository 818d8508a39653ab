"""Graph rewrites, one file each. A pass applies what it was given; it never chooses."""
