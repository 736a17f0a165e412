"""One SAM update, made of closures: record, perturb, replay, restore. Needs no Trainer."""
