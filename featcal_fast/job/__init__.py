"""A recipe carried out: folders in, a folder out."""
