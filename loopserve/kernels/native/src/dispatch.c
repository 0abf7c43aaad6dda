// List the instruction sets of this library that the processor supports, best first.
#define _GNU_SOURCE
#include <string.h>

#if defined(__x86_64__)
static int has_avx512bf16(void) {
    return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw");
}
static int has_avx512(void) { return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"); }
static int has_avx2(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#endif
static __attribute__((unused)) int has_generic(void) { return 1; }

#define LS_LEVEL(name) {#name, has_##name},
static const struct {
    const char *name;
    int (*has)(void);
} compiled[] = {LS_LEVELS};

const char *ls_digest(void) { return LS_DIGEST; }

int ls_has_threads(void) {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}

const char *ls_levels(void) {
    static char names[128];
    char *end = names;
#if defined(__x86_64__)
    __builtin_cpu_init();
#endif
    for (size_t i = 0; i < sizeof compiled / sizeof compiled[0]; i++) {
        if (compiled[i].has()) {
            if (end != names) *end++ = ' ';
            end = stpcpy(end, compiled[i].name);
        }
    }
    *end = 0;
    return names;
}
