/* SPDX-License-Identifier: Apache-2.0
 * cmd_machine.c - moelab machine: hardware descriptions and the models behind them. */
#include "config.h"

#include "cmd.h"

#include <stdio.h>
#include <string.h>

static int help(void)
{
    printf("usage: moelab machine VERB [ARGUMENT...]\n\n"
           "  validate   published measurements against the models\n\n"
           "moelab machine VERB --help says more. Example:\n  moelab machine validate\n");
    return 0;
}

int cmd_machine(int argc, char **argv)
{
    if (argc > 1 && (!strcmp(argv[1], "--help") || !strcmp(argv[1], "-h")))
        return help();
    if (argc > 1 && !strcmp(argv[1], "validate"))
        return machine_validate(argc - 1, argv + 1);
    return cmd_usage("machine", "expected validate");
}
