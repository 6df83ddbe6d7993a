"""The words that every room uses: errors, sites and their records, sizes, progress, text for people.

It imports no other room.
"""
