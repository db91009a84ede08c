/* The libclang of the Python package has no headers of its own; these few lines are all that is needed. */
#define bool _Bool
#define true 1
#define false 0
