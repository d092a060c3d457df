/* SPDX-License-Identifier: Apache-2.0
 * main.c - the command line's first word. */
#include "config.h"

#include "cmd.h"
#include "revision.h"

#include <locale.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static const struct command {
    const char *name, *summary;
    int (*run)(int argc, char **argv);
} commands[] = {
    { "run", "run a scenario", cmd_run },
    { "plugins", "list policies, workloads and metrics, or show one", cmd_plugins },
    { "eval", "one policy, machine or metric on one input", cmd_eval },
    { "trace", "inspect, check, import or synthesise traces", cmd_trace },
    { "machine", "list, show, draw and validate machines", cmd_machine },
    { "calibrate", "measure this computer, and write a machine file", cmd_calibrate },
    { "papers", "papers whose mechanisms work, and how to get them", cmd_papers },
    { "reproduce", "published figures against ours", cmd_reproduce },
    { "rank", NULL, cmd_rank },
};

enum { N_COMMANDS = sizeof commands / sizeof *commands };

int cmd_fail(const struct err *e)
{
    fprintf(stderr, "moelab: %s\n", e->text);
    return err_exit_code(e->code);
}

int cmd_usage(const char *name, const char *fmt, ...)
{
    char text[1024];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    err_plain(text);
    fprintf(stderr, "moelab %s: %s\n(see: moelab %s --help)\n", name, text, name);
    return 2;
}

bool cmd_is_option(const char *argument)
{
    return argument[0] == '-' && argument[1];
}

const char *cmd_nearest_option(const char *given, const char *const *known, int n)
{
    char plain[80];
    snprintf(plain, sizeof plain, "%.*s", (int)strcspn(given, "="), given);
    return err_nearest(plain, known, n);
}

int cmd_unknown_option(const char *name, const char *given, const char *const *known)
{
    int n = 0;
    while (known[n])
        n++;
    const char *near = cmd_nearest_option(given, known, n);
    return cmd_usage(name, "unknown option %s%s%s%s", given, near ? "; did you mean " : "", near ? near : "",
                     near ? "?" : "");
}

static void help(FILE *to)
{
    fprintf(to, "usage: moelab COMMAND [ARGUMENT...]\n\n"
                "Which policies, on which hardware, for my traffic, and how far from the best possible?\n\n");
    for (int i = 0; i < N_COMMANDS; i++)
        if (commands[i].summary)
            fprintf(to, "  %-10s %s\n", commands[i].name, commands[i].summary);
    fprintf(to, "\nmoelab COMMAND --help says more. Example:\n"
                "  moelab run scenarios/quickstart.lua --out results/quickstart\n");
}

/* What was printed has to have arrived: a full disk is an error. */
static int flushed(int code)
{
    if (fflush(stdout) == 0 && !ferror(stdout))
        return code;
    fprintf(stderr, "moelab: standard output: cannot be written\n");
    return code ? code : 2;
}

int main(int argc, char **argv)
{
    setlocale(LC_ALL, "C");
    signal(SIGPIPE, SIG_IGN); /* a helper process that dies, a file-size limit: errors to report, not ends */
    signal(SIGXFSZ, SIG_IGN);
    if (argc < 2) {
        help(stderr);
        return 2;
    }
    if (!strcmp(argv[1], "--help") || !strcmp(argv[1], "-h") || !strcmp(argv[1], "help")) {
        help(stdout);
        return flushed(0);
    }
    if (!strcmp(argv[1], "--version")) {
        printf("moelab %s (%s)\n", PACKAGE_VERSION, MOELAB_REVISION);
        return flushed(0);
    }
    if (cmd_is_option(argv[1])) {
        static const char *const known[] = { "--help", "--version" };
        const char *near = cmd_nearest_option(argv[1], known, 2);
        fprintf(stderr, "moelab: unknown option %s%s%s%s (see: moelab --help)\n", argv[1],
                near ? "; did you mean " : "", near ? near : "", near ? "?" : "");
        return 2;
    }
    const char *names[N_COMMANDS];
    for (int i = 0; i < N_COMMANDS; i++) {
        names[i] = commands[i].name;
        if (!strcmp(argv[1], commands[i].name))
            return flushed(commands[i].run(argc - 1, argv + 1));
    }
    const char *near = err_nearest(argv[1], names, N_COMMANDS - 1);
    err_plain(argv[1]);
    fprintf(stderr, "moelab: unknown command \"%s\"%s%s%s\n", argv[1], near ? "; did you mean \"" : "",
            near ? near : "", near ? "\"?" : " (see: moelab --help)");
    return 2;
}
