/* Runs a command and says what it cost: `meter REPORT CORES COMMAND...`
 *
 * REPORT gets "wall user system peak status": seconds of the command and of all children it waited for, KiB of memory of the largest of
 * them, and its exit status. CORES is a comma-separated list of processors it may use. A program of its own, because the kernel counts
 * as a child's peak what its parent had when it forked, and a Python has more than curl ever needs.
 */
#define _GNU_SOURCE
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static double seconds(struct timeval t) { return t.tv_sec + t.tv_usec / 1e6; }

int main(int argc, char **argv) {
    if (argc < 4) return 2;
    cpu_set_t cores;
    CPU_ZERO(&cores);
    for (char *rest = argv[2]; *rest; rest += *rest == ',') CPU_SET(strtol(rest, &rest, 10), &cores);
    if (sched_setaffinity(0, sizeof cores, &cores)) return 2;
    double begin = now();
    pid_t child = fork();
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL); /* whoever loses patience with us kills only us */
        execvp(argv[3], argv + 3);
        perror(argv[3]);
        _exit(127);
    }
    int status;
    struct rusage used;
    if (child < 0 || wait4(child, &status, 0, &used) != child) return 2;
    double wall = now() - begin;
    FILE *report = fopen(argv[1], "w");
    if (!report) return 2;
    fprintf(report, "%f %f %f %ld %d\n", wall, seconds(used.ru_utime), seconds(used.ru_stime), used.ru_maxrss,
            WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
    return fclose(report) ? 2 : 0;
}
