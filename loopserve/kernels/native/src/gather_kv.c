// Copy chosen rows of keys and values in one call.
#include <string.h>

#include "common.h"

// keys, values: head and row strides in bytes; copies are contiguous [heads, chosen, row bytes].
void LS(gather_kv)(const char *keys, const char *values, const int64_t *columns, char *key_copies, char *value_copies,
                   int64_t heads, int64_t chosen, int64_t key_bytes, int64_t value_bytes, int64_t key_head, int64_t key_row,
                   int64_t value_head, int64_t value_row, int64_t columns_head, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t head = 0; head < heads; head++) {
        const char *from_keys = keys + head * key_head, *from_values = values + head * value_head;
        char *to_keys = key_copies + head * chosen * key_bytes, *to_values = value_copies + head * chosen * value_bytes;
        for (int64_t i = 0; i < chosen; i++) {
            int64_t column = columns[head * columns_head + i];
            memcpy(to_keys + i * key_bytes, from_keys + column * key_row, key_bytes);
            memcpy(to_values + i * value_bytes, from_values + column * value_row, value_bytes);
        }
    }
}
