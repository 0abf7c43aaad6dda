// Included by all kernels. Each source is compiled once per instruction set; LS(name) adds the set to a public name.
#pragma once
#include <stdint.h>

#define LS_JOIN(name, suffix) ls_##name##_##suffix
#define LS_EXPAND(name, suffix) LS_JOIN(name, suffix)
#define LS(name) LS_EXPAND(name, LS_SUFFIX)
