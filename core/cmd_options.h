/* SPDX-License-Identifier: Apache-2.0
 * cmd_options.h - one table of options for each verb of `moelab trace`. */
#ifndef CMD_OPTIONS_H
#define CMD_OPTIONS_H

#include "err.h"
#include <stdbool.h>
#include <stdint.h>

enum option_type { OPTION_END, OPTION_FLAG, OPTION_INT, OPTION_SEED, OPTION_REAL, OPTION_TEXT };

struct option {
    enum option_type type;
    const char *name, *argument, *help;
    void *out;       /* bool, int32_t, uint64_t, double, const char * */
    double min, max; /* OPTION_INT; a real's range is checked by what uses it */
    bool given;
};

/* clang-format off */
#define FLAG(name, help, out) { OPTION_FLAG, name, NULL, help, out, 0, 0, false }
#define TEXT(name, argument, help, out) { OPTION_TEXT, name, argument, help, out, 0, 0, false }
#define REAL(name, argument, help, out) { OPTION_REAL, name, argument, help, out, 0, 0, false }
#define SEED(name, argument, help, out) { OPTION_SEED, name, argument, help, out, 0, 0, false }
#define INT(name, argument, help, out, min, max) { OPTION_INT, name, argument, help, out, min, max, false }
/* clang-format on */

struct verb {
    const char *name, *positional, *summary, *example;
    int (*run)(int argc, char **argv, const struct verb *, struct err *);
};

/* Sets options and, unless dir is NULL, the one positional argument. Returns 1 when help was asked for and given. */
int options_parse(int argc, char **argv, const struct verb *, struct option *, const char **dir, struct err *);
bool options_given(const struct option *, const char *name);

#endif
