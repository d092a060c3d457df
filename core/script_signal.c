/* SPDX-License-Identifier: Apache-2.0
 * script_signal.c - what ends a scenario from outside: signals, and the clock on its own time. Whatever it is, nothing
 * half-written is left. */
#include "config.h"

#include "script_internal.h"

#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

/* ---- leaving from within a signal handler ---- */

/* What a scenario that is cut short would leave behind. Handlers read it; the process that set it is its owner. */
static struct { volatile pid_t owner; char part[440], synth[300]; } leftovers;

/* Only what is safe in a handler: _Fork, exec, waitpid. */
static void remove_leftovers(void)
{
    if (leftovers.owner != getpid())
        return; /* a run: its parent cleans up */
    pid_t pid = _Fork();
    if (pid == 0) {
        execl("/bin/rm", "rm", "-rf", "--", leftovers.part, leftovers.synth, (char *)NULL);
        _exit(127);
    }
    if (pid > 0)
        waitpid(pid, NULL, 0);
}

static void on_end(int signal_number)
{
    static const char text[] = "moelab: a policy, or moelab itself, crashed outside of a run\n";
    bool crashed = signal_number != SIGINT && signal_number != SIGTERM && signal_number != SIGHUP;
    if (crashed && leftovers.owner == getpid() && write(STDERR_FILENO, text, sizeof text - 1) < 0) {
        /* nobody to tell */
    }
    remove_leftovers();
    signal(signal_number, SIG_DFL);
    raise(signal_number);
}

void script_watch(const char *part)
{
    static const int ends[] = { SIGINT, SIGTERM, SIGHUP, SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT };
    leftovers.owner = 0;
    snprintf(leftovers.part, sizeof leftovers.part, "%s", part ? part : "");
    leftovers.synth[0] = '\0';
    leftovers.owner = part ? getpid() : 0;
    for (size_t i = 0; i < sizeof ends / sizeof *ends; i++) {
        void (*before)(int) = signal(ends[i], part ? on_end : SIG_DFL);
        if (before != SIG_DFL && before != on_end)
            signal(ends[i], before);
    }
}

void script_watch_synth(const char *dir)
{
    snprintf(leftovers.synth, sizeof leftovers.synth, "%s", dir);
}

/* ---- time ---- */

static lua_State *volatile clocked; /* NULL: no clock */
static volatile sig_atomic_t clock_rings;
static double clock_seconds;
static struct itimerval clock_left; /* while paused */

/* The hook stays, so that a script that catches the error meets it again at once. */
static void on_clock(lua_State *L, lua_Debug *ar)
{
    (void)ar;
    script_error(L, "the script did not end within %g s (--run-timeout)", clock_seconds);
}

/* First ring: stop at the next Lua instruction. Second: the script is inside one long call of a library. */
static void ring(int signal_number)
{
    (void)signal_number;
    if (!clocked)
        return;
    if (clock_rings++ == 0) {
        lua_sethook(clocked, on_clock, LUA_MASKCOUNT | LUA_MASKCALL | LUA_MASKRET, 1);
        return;
    }
    char text[800];
    const char *file;
    int line; /* the state can be read: for the whole interval it has stood still inside the call */
    script_where(clocked, 0, &file, &line);
    int n = snprintf(text, sizeof text, "moelab: %.600s:%d: the script did not end within --run-timeout, and is inside "
                     "one call of a library\n", file, line);
    if (n < 0 || write(STDERR_FILENO, text, (size_t)n) < 0) {
        /* nobody to tell */
    }
    remove_leftovers();
    _exit(2);
}

lua_State *script_clock_start(lua_State *L, double seconds)
{
    struct sigaction action = { .sa_handler = ring, .sa_flags = SA_RESTART };
    lua_State *before = clocked;
    if (!before && !(seconds > 0))
        return NULL;
    clocked = L;
    if (before)
        return before;
    clock_rings = 0;
    clock_seconds = seconds;
    sigaction(SIGALRM, &action, NULL);
    struct itimerval t = { .it_value = { (time_t)seconds, (suseconds_t)(fmod(seconds, 1) * 999999) + 1 },
                           .it_interval = { 0, 500000 } };
    setitimer(ITIMER_REAL, &t, NULL);
    return NULL;
}

void script_clock_pause(void)
{
    setitimer(ITIMER_REAL, &(struct itimerval){ 0 }, &clock_left);
}

void script_clock_resume(void)
{
    setitimer(ITIMER_REAL, &clock_left, NULL);
}

void script_clock_stop(lua_State *L, lua_State *before)
{
    if (before) {
        clocked = before;
        return;
    }
    setitimer(ITIMER_REAL, &(struct itimerval){ 0 }, NULL);
    clocked = NULL;
    lua_sethook(L, NULL, 0, 0);
}
