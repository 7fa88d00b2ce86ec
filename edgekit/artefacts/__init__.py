"""What reaches the device, whatever method made it: one file per kind of artefact."""
