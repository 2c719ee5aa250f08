"""The recursion: levels that draft for one another, the loop around them, and the rule by which drafts are accepted."""
