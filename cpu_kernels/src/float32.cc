#include "handlers.h"

MLSPECQD_OF_FLOATS(float32, F32)
