"""Small helpers shared by the training scripts. No algorithm's name appears in here."""
