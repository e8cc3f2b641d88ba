"""stylefast inside other platforms; each module needs the packages of its platform."""
