"""One SAM update, made of closures: record, perturb, replay, restore. It knows no Trainer."""
