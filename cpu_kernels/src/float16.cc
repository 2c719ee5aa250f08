#include "handlers.h"

MLSPECQD_OF_FLOATS(float16, F16)
