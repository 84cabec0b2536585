/*
 * Probe is the program that the benchmark runs in containers. It says when it
 * began and when it ended, on CLOCK_MONOTONIC, so that a downtime is seen from
 * inside: from the last instruction of one to the first of the next.
 *
 *	bench-probe FILE
 *
 * appends to FILE the line
 *
 *	start NANOSECONDS PID GENERATION
 *
 * as the first thing it does, waits for SIGTERM without using the processor, and
 * appends
 *
 *	end NANOSECONDS
 *
 * as the last thing before it exits, each with one write. GENERATION is the value
 * of WORKSPACE_GENERATION, or 0.
 *
 *	bench-probe FILE PROGRAM
 *
 * waits until it reads a byte or the end of its standard input, and becomes
 * PROGRAM, which is to be the probe, with FILE: the least that a process can do
 * which stands by.
 *
 * There is no C library in it: starting one would count as ours.
 */
#include <fcntl.h>
#include <signal.h>
#include <sys/syscall.h>
#include <time.h>

#define NONE 0L

#if defined(__x86_64__)
#define ENTRY "xor %ebp, %ebp\n mov %rsp, %rdi\n and $-16, %rsp\n call begin\n"
static long call(long number, long a, long b, long c, long d)
{
	long result;
	register long r10 __asm__("r10") = d;
	__asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10) : "rcx", "r11", "memory");
	return result;
}
#elif defined(__aarch64__)
#define ENTRY "mov x29, xzr\n mov x0, sp\n bl begin\n"
static long call(long number, long a, long b, long c, long d)
{
	register long x8 __asm__("x8") = number;
	register long x0 __asm__("x0") = a;
	register long x1 __asm__("x1") = b;
	register long x2 __asm__("x2") = c;
	register long x3 __asm__("x3") = d;
	__asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3) : "memory");
	return x0;
}
#else
#error "the probe is not written for this processor"
#endif

__asm__(".globl _start\n_start:\n" ENTRY);

static long now(void)
{
	struct timespec t;
	call(SYS_clock_gettime, CLOCK_MONOTONIC, (long)&t, NONE, NONE);
	return t.tv_sec * 1000000000L + t.tv_nsec;
}

static char line[256];
static int length;

static void text(const char *s)
{
	while (*s && length < (int)sizeof(line) - 1)
		line[length++] = *s++;
}

static void number(long n)
{
	char digits[24], *p = digits + sizeof(digits) - 1;
	*p = 0;
	do
		*--p = '0' + n % 10;
	while (n /= 10);
	text(p);
}

static void flush(int file)
{
	line[length++] = '\n';
	call(SYS_write, file, (long)line, length, NONE);
	length = 0;
}

/* value returns what follows the name and the equals sign, or a null pointer. */
static const char *value(const char *entry, const char *name)
{
	while (*name)
		if (*entry++ != *name++)
			return 0;
	return *entry == '=' ? entry + 1 : 0;
}

/* begin gets the stack as the kernel makes it: argc, argv, environment. */
__attribute__((noreturn, used)) void begin(long *stack)
{
	long began = now();
	long argc = stack[0];
	char **argv = (char **)(stack + 1), **env = argv + argc + 1;
	const char *generation = "0", *v;
	if (argc > 2) {
		char *args[] = { argv[2], argv[1], 0 };
		call(SYS_read, 0, (long)line, 1, NONE);
		call(SYS_execve, (long)argv[2], (long)args, (long)env, NONE);
		call(SYS_exit_group, 2, NONE, NONE, NONE);
	}
	/* A signal that is blocked is kept until it is waited for, by the first process
	 * of a container too. */
	unsigned long set = 1UL << (SIGTERM - 1);
	call(SYS_rt_sigprocmask, SIG_BLOCK, (long)&set, NONE, sizeof(set));
	int file = argc < 2 ? -1 : (int)call(SYS_openat, AT_FDCWD, (long)argv[1], O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0666);
	if (file < 0)
		call(SYS_exit_group, 2, NONE, NONE, NONE);
	for (; *env; env++)
		if ((v = value(*env, "WORKSPACE_GENERATION")))
			generation = v;
	text("start ");
	number(began);
	text(" ");
	number(call(SYS_getpid, NONE, NONE, NONE, NONE));
	text(" ");
	text(generation);
	flush(file);
	while (call(SYS_rt_sigtimedwait, (long)&set, NONE, NONE, sizeof(set)) != SIGTERM)
		;
	text("end ");
	number(now());
	flush(file);
	for (;;)
		call(SYS_exit_group, 0, NONE, NONE, NONE);
}
