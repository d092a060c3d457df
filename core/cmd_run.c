/* SPDX-License-Identifier: Apache-2.0
 * cmd_run.c - moelab run FILE.lua */
#include "config.h"

#include "cmd.h"
#include "rank.h"
#include "script.h"
#include "team.h"

#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static void help(void)
{
    puts("usage: moelab run FILE.lua [OPTION...]\n\n"
         "Runs a scenario: all combinations of its axes, each in a process of its own.\n\n"
         "  --out DIR          results directory (default: results/NAME)\n"
         "  --set KEY=VALUE    override a key of the experiment: machine.nodes=8, workload.steps=5, seed=3\n"
         "  --machine NAME     executor: flow, simgrid, host or cuda\n"
         "  --against NAME     runs everything on this executor, too, and compares: --machine host --against flow\n"
         "  --jobs N           runs at a time (default: one per processor)\n"
         "  --run-timeout S    seconds after which a run, or the script's own loop, is ended (default: 600; 0: never)\n"
         "  --unsafe           give the script files, processes and native libraries\n"
         "  --allow-extrapolation  run models outside of their ranges, and mark the results\n"
         "  --quiet            no tables\n\n"
         "Exit code: 0 done, 1 some runs failed, 2 bad usage or input.\n\n"
         "Example:\n  moelab run scenarios/quickstart.lua --out results/quickstart --set seed=2");
}

/* What getopt did not take: a flag with a value, several options that begin so, or none. */
static int bad_option(const char *text, const struct option *o)
{
    enum { MAX_OPTIONS = 16 };
    char flags[MAX_OPTIONS][40];
    const char *known[MAX_OPTIONS + 1] = { NULL };
    size_t given = strcspn(text, "=");
    for (int n = 0; o->name && n < MAX_OPTIONS; o++, n++) {
        snprintf(flags[n], sizeof flags[n], "--%s", o->name);
        if (strlen(flags[n]) == given && !strncmp(text, flags[n], given))
            return cmd_usage("run", "%s takes no value", flags[n]);
        known[n] = flags[n];
    }
    return cmd_unknown_option("run", text, known);
}

static bool measures(const char *executor)
{
    return !strcmp(executor, "host") || !strcmp(executor, "cuda");
}

/* mpirun has started several: the first reads the scenario and leads the others through what is to run on ranks. */
static int run_as_rank(const char *scenario, const struct script_options *o)
{
    struct err e = { 0 };
    if (o->team->rank > 0)
        rank_follow(o->team, &e);
    else if (script_run(scenario, o, NULL, &e) == 0 || !o->team->lost)
        rank_dismiss(o->team);
    const int code = e.code ? cmd_fail(&e) : 0;
    if (o->team->lost)
        _exit(code); /* see cmd_rank.c */
    team_leave(o->team);
    return code;
}

int cmd_run(int argc, char **argv)
{
    static const struct option long_options[] = {
        { "out", required_argument, NULL, 'o' },     { "set", required_argument, NULL, 's' },
        { "machine", required_argument, NULL, 'm' }, { "against", required_argument, NULL, 'a' },
        { "jobs", required_argument, NULL, 'j' },
        { "run-timeout", required_argument, NULL, 't' }, { "unsafe", no_argument, NULL, 'u' },
        { "quiet", no_argument, NULL, 'q' },         { "allow-extrapolation", no_argument, NULL, 'e' },
        { "help", no_argument, NULL, 'h' },
        { NULL, 0, NULL, 0 },
    };
    long processors = sysconf(_SC_NPROCESSORS_ONLN);
    const char *set[argc];
    struct script_options o = { .set = set, .jobs = processors > 0 ? (int)processors : 1, .timeout_s = 600,
                                .progress = isatty(STDERR_FILENO) };
    char *end;
    opterr = 0; /* getopt's own messages know no nearest option */
    for (int c; (c = getopt_long(argc, argv, ":", long_options, NULL)) != -1;) {
        switch (c) {
        case 'o': o.out = optarg; break;
        case 's': set[o.n_set++] = optarg; break;
        case 'm': o.executor = optarg; break;
        case 'a': o.against = optarg; break;
        case 'j':
            o.jobs = (int)strtol(optarg, &end, 10);
            if (*end || o.jobs < 1 || o.jobs > 4096)
                return cmd_usage("run", "--jobs %s: expected a number from 1 to 4096", optarg);
            break;
        case 't':
            o.timeout_s = strtod(optarg, &end);
            if (*end || !(o.timeout_s >= 0) || o.timeout_s > 1e9)
                return cmd_usage("run", "--run-timeout %s: expected seconds, 0 or more", optarg);
            break;
        case 'u': o.unsafe = true; break;
        case 'q': o.quiet = true; break;
        case 'e': o.extrapolate = true; break;
        case 'h': help(); return 0;
        case ':': return cmd_usage("run", "%s needs a value", argv[optind - 1]);
        default: /* within "-xyz" getopt has not gone on yet */
            return bad_option(argv[optind] && optopt && argv[optind][0] == '-' && argv[optind][1] == optopt
                                  ? argv[optind] : argv[optind - 1], long_options);
        }
    }
    if (optind + 1 != argc)
        return cmd_usage("run", "expected one scenario, found %d", argc - optind);
    if (o.against && (!o.executor || !strcmp(o.executor, o.against)))
        return cmd_usage("run", "--against %s: expected --machine with another executor", o.against);
    if (o.against && measures(o.executor) && measures(o.against))
        return cmd_usage("run", "--machine %s --against %s: both measure, each on hardware of its own; "
                         "expected flow or simgrid as one of them", o.executor, o.against);
    struct err e = { 0 };
    if (team_open(&o.team, &e) < 0)
        return cmd_fail(&e);
    if (!o.team)
        return script_run(argv[optind], &o, NULL, &e) < 0 ? cmd_fail(&e) : 0;
    return run_as_rank(argv[optind], &o);
}
