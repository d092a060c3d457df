/* SPDX-License-Identifier: MIT
 *
 * Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
 * documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
 * rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to
 * permit persons to whom the Software is furnished to do so, subject to the following conditions:
 *
 * The above copyright notice and this permission notice shall be included in all copies or substantial portions of
 * the Software.
 *
 * THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO
 * THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
 * AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT,
 * TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
 * SOFTWARE.
 *
 * simgrid_server.cpp - moelab-simgrid: answers on standard output, with SimGrid, how long the flows take that are
 * named on standard input. A program of its own because the engine is a singleton that abort()s, and because Debian's
 * libsimgrid links GPL-2 code: nothing of moelab's core is in here.
 *
 * One command a line, words separated by blanks, reals as C99 hexadecimal or decimal, ids from 0:
 *
 *   > (start)                                    < moelab-simgrid 2           version of this protocol
 *   > platform N_HOSTS N_LINKS N_ROUTES
 *   > BANDWIDTH MOST               per link                                   at first; ever
 *   > SRC DST N_LINKS LINK...      per route     < ready
 *   > start TIME N
 *   > FLOW SRC DST BYTES           per flow      (no answer)
 *   > advance UNTIL                              < done N                     first end(s) of flows up to UNTIL; N = 0:
 *                                                < FLOW TIME   per end          none, and the clock shows UNTIL
 *   > bandwidth TIME LINK B/S                    (no answer)                 from TIME on; 0: next to nothing, because
 *                                                                              SimGrid would end what crosses the link
 *   > quit, or end of file
 *
 * Started as `moelab-simgrid --parallel-task` it knows one exchange only, of at most one flow per pair, which it makes
 * one task of SimGrid's model L07: all its flows go on in step and end together. That is for comparison.
 * Started as `moelab-simgrid --platform FILE MAX_HOSTS` it reads a platform instead: simgrid_platform.cpp.
 *
 * What is wrong is answered by `error TEXT`, and the program ends with status 1. */
#include "simgrid_platform.h"

#include <simgrid/s4u.hpp>

#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <set>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace s4u = simgrid::s4u;

/* SimGrid counts whole units of payload; flows are shares of messages. So its unit is a 1024th of a byte. */
static const double units_per_byte = 1024;
/* B/s of a link that has failed: a flow that would have to wait for it ends after the universe. */
static const double trickle = 1e-9;

[[noreturn]] __attribute__((format(printf, 1, 2))) static void fail(const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    fputs("error ", stdout);
    vprintf(fmt, ap);
    putchar('\n');
    va_end(ap);
    fflush(stdout);
    _Exit(1); /* no destructors: the engine's may abort when a simulation is under way */
}

static long read_int(const char *what, long limit)
{
    long x;
    if (scanf("%ld", &x) != 1 || x < 0 || x >= limit)
        fail("%s: expected a whole number below %ld", what, limit);
    return x;
}

static double read_real(const char *what)
{
    double x;
    if (scanf("%lf", &x) != 1 || std::isnan(x) || x < 0)
        fail("%s: expected a number >= 0", what);
    return x;
}

class Server
{
    s4u::Engine *engine_;
    std::vector<s4u::Host *> host_;
    std::vector<s4u::Link *> link_;
    std::vector<double> now_, most_; /* bandwidth of each link */
    std::set<size_t> narrow_;        /* links below their most */
    bool parallel_task_;
    std::vector<long> task_flows_; /* ids of the flows that are one task */
    s4u::ExecPtr task_;
    std::unordered_map<const s4u::Activity *, std::pair<long, s4u::CommPtr>> under_way_;
    std::vector<std::pair<long, double>> ended_;
    std::vector<s4u::CommPtr> dead_; /* freed outside of the engine's loop */
    std::set<s4u::Activity *> stop_; /* run_until() returns when this is not empty */

    void on_end(const s4u::Activity &activity)
    {
        if (&activity == task_.get()) {
            for (long id : task_flows_)
                ended_.emplace_back(id, s4u::Engine::get_clock());
            stop_.insert(task_.get());
            return;
        }
        auto it = under_way_.find(&activity);
        if (it == under_way_.end())
            return;
        ended_.emplace_back(it->second.first, s4u::Engine::get_clock());
        stop_.insert(it->second.second.get());
        dead_.push_back(std::move(it->second.second));
        under_way_.erase(it);
    }

    /* Goes on to `until`, or to the next end of a flow. In a loop, because run_until() is content with a clock within
     * 1e-5 s of what it was asked for. */
    void run(double until)
    {
        while (ended_.empty() && s4u::Engine::get_clock() < until) {
            double before = s4u::Engine::get_clock();
            stop_.clear();
            if (std::isinf(until))
                engine_->run();
            else
                engine_->run_until(until);
            dead_.clear();
            /* A step below the clock's resolution is a step done. */
            if (ended_.empty() && s4u::Engine::get_clock() == before)
                break;
        }
    }

    static double units(double bandwidth) { return (bandwidth > trickle ? bandwidth : trickle) * units_per_byte; }

  public:
    Server(s4u::Engine *engine, bool parallel_task) : engine_(engine), parallel_task_(parallel_task)
    {
        engine_->track_vetoed_activities(&stop_);
        s4u::Activity::on_completion_cb([this](const s4u::Activity &a) { on_end(a); });
    }

    void read_platform()
    {
        long n_hosts = read_int("platform: hosts", 1 << 16), n_links = read_int("platform: links", 1 << 24);
        long n_routes = read_int("platform: routes", 1L << 32);
        s4u::NetZone *zone = s4u::create_full_zone("machine");
        for (long i = 0; i < n_hosts; i++)
            host_.push_back(zone->create_host("h" + std::to_string(i), 1e9));
        for (long i = 0; i < n_links; i++) { /* latency stays 0: the sharing would depend on it */
            now_.push_back(read_real("bandwidth"));
            most_.push_back(read_real("most"));
            link_.push_back(zone->create_link("l" + std::to_string(i), units(now_.back())));
            if (now_.back() < most_.back())
                narrow_.insert(static_cast<size_t>(i));
        }
        for (long i = 0; i < n_routes; i++) {
            long src = read_int("route: source", n_hosts), dst = read_int("route: destination", n_hosts);
            std::vector<s4u::LinkInRoute> route;
            for (long n = read_int("route: links", 64); n > 0; n--)
                route.emplace_back(link_[static_cast<size_t>(read_int("route: link", n_links))]);
            zone->add_route(host_[static_cast<size_t>(src)]->get_netpoint(),
                            host_[static_cast<size_t>(dst)]->get_netpoint(), nullptr, nullptr, route, false);
        }
        zone->seal();
        puts("ready");
        fflush(stdout);
    }

    void start()
    {
        run(read_real("start: time"));
        if (parallel_task_) {
            start_task();
            return;
        }
        long n_hosts = static_cast<long>(host_.size());
        /* A flow never gets more than its links have when it starts: so they have their most, for no time. */
        for (size_t l : narrow_)
            link_[l]->set_bandwidth(units(most_[l]));
        for (long n = read_int("start: flows", 1L << 32); n > 0; n--) {
            long id = read_int("flow: id", 1L << 32);
            s4u::Host *src = host_[static_cast<size_t>(read_int("flow: source", n_hosts))];
            s4u::Host *dst = host_[static_cast<size_t>(read_int("flow: destination", n_hosts))];
            s4u::CommPtr comm = s4u::Comm::sendto_init(src, dst);
            comm->set_payload_size(static_cast<uint64_t>(std::ceil(read_real("flow: bytes") * units_per_byte)));
            under_way_[comm.get()] = { id, comm };
            comm->start();
        }
        for (size_t l : narrow_)
            link_[l]->set_bandwidth(units(now_[l]));
    }

    void start_task()
    {
        size_t n_hosts = host_.size();
        std::vector<double> bytes(n_hosts * n_hosts);
        if (task_)
            fail("start: one exchange is one parallel task, found another");
        for (long n = read_int("start: flows", 1L << 32); n > 0; n--) {
            task_flows_.push_back(read_int("flow: id", 1L << 32));
            size_t src = static_cast<size_t>(read_int("flow: source", static_cast<long>(n_hosts)));
            size_t dst = static_cast<size_t>(read_int("flow: destination", static_cast<long>(n_hosts)));
            bytes[src * n_hosts + dst] = read_real("flow: bytes") * units_per_byte;
        }
        task_ = s4u::Exec::init();
        task_->set_flops_amounts(std::vector<double>(n_hosts, 0));
        task_->set_bytes_amounts(bytes);
        task_->set_hosts(host_);
        task_->start();
    }

    void bandwidth()
    {
        run(read_real("bandwidth: time"));
        size_t l = static_cast<size_t>(read_int("bandwidth: link", static_cast<long>(link_.size())));
        now_[l] = read_real("bandwidth");
        link_[l]->set_bandwidth(units(now_[l]));
        if (now_[l] < most_[l])
            narrow_.insert(l);
        else
            narrow_.erase(l);
    }

    void advance()
    {
        run(read_real("advance: time"));
        printf("done %zu\n", ended_.size());
        for (const auto &end : ended_)
            printf("%ld %a\n", end.first, end.second);
        fflush(stdout);
        ended_.clear();
    }
};

int main(int argc_given, char **argv_given)
{
    if (argc_given == 4 && strcmp(argv_given[1], "--platform") == 0)
        simgrid_platform(argv_given[2], argv_given[3]);
    bool parallel_task = argc_given > 1 && strcmp(argv_given[1], "--parallel-task") == 0;
    puts("moelab-simgrid 2");
    fflush(stdout);

    /* Plain max-min sharing: no TCP window, no slow-down by latency or by acknowledgements on the way back. */
    const char *args[] = { "moelab-simgrid",
                           "--log=root.thresh:error",
                           "--cfg=network/model:CM02",
                           "--cfg=network/crosstraffic:0",
                           "--cfg=network/TCP-gamma:0",
                           "--cfg=network/weight-S:0",
                           "--cfg=network/bandwidth-factor:1",
                           "--cfg=network/latency-factor:1",
                           "--cfg=surf/precision:1e-12",
                           "--cfg=maxmin/precision:1e-12",
                           "--cfg=maxmin/concurrency-limit:-1" };
    int argc = sizeof args / sizeof args[0];
    std::vector<char *> argv;
    for (const char *a : args)
        argv.push_back(strdup(a));
    if (parallel_task) {
        argv.push_back(strdup("--cfg=host/model:ptask_L07"));
        argc++;
    }
    argv.push_back(nullptr);
    s4u::Engine engine(&argc, argv.data());
    Server server(&engine, parallel_task);

    char word[16];
    bool ready = false;
    while (scanf("%15s", word) == 1) {
        if (strcmp(word, "platform") == 0 && !ready) {
            server.read_platform();
            ready = true;
        } else if (strcmp(word, "start") == 0 && ready) {
            server.start();
        } else if (strcmp(word, "advance") == 0 && ready) {
            server.advance();
        } else if (strcmp(word, "bandwidth") == 0 && ready) {
            server.bandwidth();
        } else if (strcmp(word, "quit") == 0) {
            break;
        } else {
            fail("found \"%s\", expected %s", word, ready ? "start, advance, bandwidth or quit" : "platform");
        }
    }
    fflush(stdout);
    _Exit(0);
}
