#include "go_asm.h"
#include "textflag.h"

// See standby.go. The kernel enters with the stack as execve makes it: argc, the
// pointers of argv, 0, those of the environment, 0. A call of the kernel takes its
// number in AX and its arguments in DI, SI, DX, R10, R8, R9; it returns in AX, from
// -4095 to -1 an error, and changes CX and R11.

#define SYS_read       0
#define SYS_write      1
#define SYS_mmap       9
#define SYS_madvise    28
#define SYS_execve     59
#define SYS_fcntl      72
#define SYS_exit_group 231
#define SYS_newfstatat 262
#define SYS_faccessat  269

#define EINTR               4
#define AT_FDCWD            -100
#define X_OK                1
#define S_IFMT              0xf000
#define S_IFREG             0x8000
#define F_SETFD             2
#define FD_CLOEXEC          1
#define PROT_READ_WRITE     3
#define MAP_BLOCK           0x104022 // PRIVATE, ANONYMOUS, NORESERVE, FIXED_NOREPLACE
#define MADV_POPULATE_WRITE 23
#define STAT_SIZE           144
#define STAT_MODE           24

#define STANDBY_NAME 0x7962646e617473 // "standby" and its zero

#define ERRNO R12 // why there is no command, 0 if none was found
#define BLOCK R13
#define SELF  R14 // the path of this program
#define HOME  R15 // "HOME=..." or 0

TEXT workspace_init_entry(SB), NOSPLIT|NOFRAME, $0
	MOVQ  8(SP), AX
	TESTQ AX, AX
	JEQ   init
	MOVQ  $STANDBY_NAME, CX
	CMPQ  CX, (AX)
	JEQ   standby

init:
	JMP _rt0_amd64_linux(SB)

standby:
	MOVQ 16(SP), SELF
	MOVQ 32(SP), HOME
	SUBQ $STAT_SIZE, SP

	// No command inherits the FIFOs.
	MOVQ $SYS_fcntl, AX
	MOVQ $const_goAheadFD, DI
	MOVQ $F_SETFD, SI
	MOVQ $FD_CLOEXEC, DX
	SYSCALL
	MOVQ $SYS_fcntl, AX
	MOVQ $const_resultFD, DI
	MOVQ $F_SETFD, SI
	MOVQ $FD_CLOEXEC, DX
	SYSCALL

	MOVQ $SYS_mmap, AX
	MOVQ $const_blockAddress, DI
	MOVQ $const_blockLimit, SI
	MOVQ $PROT_READ_WRITE, DX
	MOVQ $MAP_BLOCK, R10
	MOVQ $-1, R8
	MOVQ $0, R9
	SYSCALL
	MOVQ AX, BLOCK
	MOVQ $const_blockAddress, CX
	CMPQ AX, CX
	MOVQ $const_exitUsage, DI
	JNE  exit
	MOVQ $SYS_madvise, AX // where the kernel can't, it is given when it is needed
	MOVQ BLOCK, DI
	MOVQ $const_blockPresent, SI
	MOVQ $MADV_POPULATE_WRITE, DX
	SYSCALL

	MOVQ $SYS_write, AX
	MOVQ $const_resultFD, DI
	MOVQ $·readyFrame(SB), SI
	MOVQ $const_frameSize, DX
	SYSCALL
	CMPQ AX, $const_frameSize
	JNE  gone

	MOVQ $0, BX // bytes read

read:
	MOVQ $SYS_read, AX
	MOVQ $const_goAheadFD, DI
	LEAQ (BLOCK)(BX*1), SI
	MOVQ $const_blockLimit, DX
	SUBQ BX, DX
	SYSCALL
	CMPQ AX, $-EINTR
	JEQ  read
	CMPQ AX, $0
	JLE  gone // the end, or an error
	ADDQ AX, BX
	CMPQ BX, $const_blockHeader
	JLT  read
	MOVQ $const_blockMagic, CX
	CMPQ CX, (BLOCK)
	JNE  gone
	CMPQ BX, const_blockSize(BLOCK)
	JLT  read // a size above the limit: until nothing can be read any more
	JNE  gone

	MOVQ  const_blockHome(BLOCK), AX
	TESTQ AX, AX
	JEQ   look
	MOVQ  HOME, (AX)

look:
	MOVQ $0, ERRNO
	MOVQ const_blockPaths(BLOCK), BX

next:
	MOVQ  (BX), SI
	TESTQ SI, SI
	JEQ   explain
	ADDQ  $8, BX
	MOVQ  $SYS_faccessat, AX
	MOVQ  $AT_FDCWD, DI
	MOVQ  $X_OK, DX
	SYSCALL
	TESTQ AX, AX
	JNE   next
	MOVQ  $SYS_newfstatat, AX
	MOVQ  $AT_FDCWD, DI
	MOVQ  -8(BX), SI
	MOVQ  SP, DX
	MOVQ  $0, R10
	SYSCALL
	TESTQ AX, AX
	JNE   next
	MOVL  STAT_MODE(SP), AX
	ANDL  $S_IFMT, AX
	CMPL  AX, $S_IFREG
	JNE   next

	MOVQ $SYS_write, AX
	MOVQ $const_resultFD, DI
	MOVQ $·executingFrame(SB), SI
	MOVQ $const_frameSize, DX
	SYSCALL
	CMPQ AX, $const_frameSize
	JNE  gone
	MOVQ $SYS_execve, AX
	MOVQ -8(BX), DI
	MOVQ const_blockArgv(BLOCK), SI
	MOVQ const_blockEnvp(BLOCK), DX
	SYSCALL
	NEGQ AX
	MOVQ AX, ERRNO

explain:
	// First of all that there is no command: an end of the FIFO after the executing
	// frame, and nothing else, would say that there is one.
	CMPQ ERRNO, $255
	JLE  report
	MOVQ $255, ERRNO

report:
	MOVQ $·failedFrame(SB), SI
	MOVQ ERRNO, AX
	MOVB AX, const_frameErrno(SI)
	MOVQ $SYS_write, AX
	MOVQ $const_resultFD, DI
	MOVQ $const_frameSize, DX
	SYSCALL

	MOVQ const_blockErrno(BLOCK), DI
	MOVQ ERRNO, AX
	SHRQ $4, AX
	ADDQ $'a', AX
	MOVB AX, (DI)
	MOVQ ERRNO, AX
	ANDQ $15, AX
	ADDQ $'a', AX
	MOVB AX, 1(DI)
	MOVQ $SYS_fcntl, AX
	MOVQ $const_resultFD, DI
	MOVQ $F_SETFD, SI
	MOVQ $0, DX
	SYSCALL
	MOVQ $SYS_execve, AX
	MOVQ SELF, DI
	MOVQ const_blockExplainArgv(BLOCK), SI
	MOVQ const_blockExplainEnvp(BLOCK), DX
	SYSCALL
	MOVQ $const_exitRefused, DI
	JMP  exit

gone:
	MOVQ $const_exitNoDaemon, DI

exit:
	MOVQ $SYS_exit_group, AX
	SYSCALL
	INT  $3
