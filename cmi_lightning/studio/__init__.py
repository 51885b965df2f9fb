"""The page on which a photograph is restored; needs the extra ``studio``."""
