//! Faults one by one, with what exactly becomes of each.
