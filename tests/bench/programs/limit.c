/* What this machine can do at all: `limit PORT PATH FILE splice|read [durable]`
 *
 * GETs http://127.0.0.1:PORT/PATH into FILE: socket -> pipe -> file without a copy (splice), or with one buffer (read). With `durable`
 * the kernel is asked to write back every 8 MiB, and the file is synced at the end. Checks nothing but the length.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <unistd.h>

#define PIECE (1 << 20)
#define WRITE_BACK (8 << 20)

static void die(const char *what) {
    perror(what);
    exit(1);
}

static int open_connection(int port) {
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int connection = socket(AF_INET, SOCK_STREAM, 0);
    if (connection < 0 || connect(connection, (struct sockaddr *)&to, sizeof to)) die("connect");
    return connection;
}

/* Sends the request and reads the head of the answer; the first bytes of the body go to the file. Returns the body's length. */
static long long ask(int connection, const char *path, int file, long long *done) {
    static char head[65536];
    int length = snprintf(head, sizeof head, "GET %s HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n", path), have = 0;
    if (write(connection, head, length) != length) die("write");
    char *end = NULL;
    while (!end) {
        ssize_t got = read(connection, head + have, sizeof head - 1 - have);
        if (got <= 0) die("read");
        head[have += got] = 0;
        end = strstr(head, "\r\n\r\n");
    }
    char *field = strcasestr(head, "\r\nContent-Length:");
    if (strncmp(head, "HTTP/1.1 200", 12) || !field) die("answer");
    *done = head + have - (end + 4);
    if (pwrite(file, end + 4, *done, 0) != *done) die("pwrite");
    return atoll(field + 17);
}

static ssize_t take_by_splice(int connection, int file, const int *pipe, loff_t at) {
    ssize_t got = splice(connection, NULL, pipe[1], NULL, PIECE, SPLICE_F_MOVE), left = got;
    while (left > 0) {
        ssize_t put = splice(pipe[0], NULL, file, &at, left, SPLICE_F_MOVE);
        if (put <= 0) die("splice");
        left -= put;
    }
    return got;
}

static ssize_t take_by_read(int connection, int file, char *buffer, off_t at) {
    ssize_t got = read(connection, buffer, PIECE);
    return got > 0 && pwrite(file, buffer, got, at) != got ? -1 : got;
}

int main(int argc, char **argv) {
    if (argc < 5) return 2;
    int splicing = !strcmp(argv[4], "splice"), durable = argc > 5;
    int connection = open_connection(atoi(argv[1])), file = open(argv[3], O_WRONLY | O_CREAT | O_TRUNC, 0644), pipes[2];
    if (file < 0 || pipe(pipes)) die(argv[3]);
    fcntl(pipes[1], F_SETPIPE_SZ, PIECE);
    char *buffer = splicing ? NULL : malloc(PIECE);
    long long done, length = ask(connection, argv[2], file, &done), clean = 0;
    while (done < length) {
        ssize_t got = splicing ? take_by_splice(connection, file, pipes, done) : take_by_read(connection, file, buffer, done);
        if (got <= 0) die("body");
        done += got;
        if (durable && done - clean >= WRITE_BACK) {
            posix_fadvise(file, clean, done - clean, POSIX_FADV_DONTNEED);
            clean = done;
        }
    }
    if (durable && fsync(file)) die("fsync");
    return close(file) ? 1 : 0;
}
