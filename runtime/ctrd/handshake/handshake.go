// Package handshake is the protocol between the containerd driver and
// workspace-init, the first process of a container, over two FIFOs. It imports
// nothing but the standard library, so that workspace-init stays tiny.
//
//	init                                 daemon
//	opens both FIFOs, checks the command
//	becomes the standby
//	Ready or Failed            ------->
//	                                     ... until the switch ...
//	                           <-------  GoAhead: command and environment
//	Executing                  ------->
//	execve: the FIFO closes    ------->  end of file: the command runs
//	or Failed, without words   ------->  it does not
//	Failed                     ------->  why it does not
//
// The standby is workspace-init without Go's runtime: execve takes long for a
// process that has threads and much memory, and nothing runs in the workspace
// meanwhile. It reports by frames as they lie in its memory. What it can't do in a
// few instructions, to explain why it did not become the command, it leaves to
// workspace-init, which it becomes again.
//
// A message that is cut short is never taken for one: a daemon that dies while it
// writes the go-ahead starts nothing.
package handshake

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// Where init finds what it needs, in the container.
const (
	// InitPath is workspace-init.
	InitPath = "/run/workspaced-init"
	// Dir holds the FIFOs.
	Dir = "/run/workspaced"
	// GoAheadName and ResultName are the FIFOs' names in Dir.
	GoAheadName = "go"
	ResultName  = "result"
)

// Exit codes of workspace-init when it does not become the command.
const (
	ExitUsage    = 120 // its arguments or FIFOs are wrong
	ExitNoDaemon = 121 // the daemon went away before a whole go-ahead was read
	ExitRefused  = 122 // a check or execve failed; the result FIFO says why
)

const (
	headerSize = 4 + 2 // magic and the payload's length
	minResult  = 6     // kind, cause, errno
	maxResult  = 2048  // it must fit PIPE_BUF with its header, to be written at once
)

var magicResult = [4]byte{'W', 'S', 'R', '2'}

// ErrFormat is in the chain of every error about a frame that is no message.
var ErrFormat = errors.New("not a handshake message")

// Kind says what a Result reports.
type Kind byte

// The kinds of results.
const (
	Ready     Kind = iota + 1 // every check passed, init waits for the go-ahead
	Executing                 // the next thing init does is execve
	Failed                    // a check or execve failed, init exits
)

// Cause classifies a failure.
type Cause byte

// The causes of failures.
const (
	CauseNone          Cause = iota
	CauseNotFound            // the command does not exist
	CauseNotExecutable       // the user may not execute it
	CauseFormat              // it is made for another machine, or no program
	CauseWorkingDir          // the working directory does not exist
	CauseExec                // execve failed
)

// Result is what init reports.
type Result struct {
	Kind  Kind
	Cause Cause
	// Errno is the system's error number, or 0.
	Errno uint32
	// Message says in words what failed. It holds no environment value. A standby's
	// Failed has none: another one follows that has, if all goes well.
	Message string
}

// WriteResult writes the result as one frame with a single write. A message
// that is too long is cut.
func WriteResult(w io.Writer, res Result) error {
	res.Message = res.Message[:min(len(res.Message), maxResult-minResult)]
	frame := append([]byte(nil), magicResult[:]...)
	frame = binary.BigEndian.AppendUint16(frame, uint16(minResult+len(res.Message)))
	frame = append(frame, byte(res.Kind), byte(res.Cause))
	frame = binary.BigEndian.AppendUint32(frame, res.Errno)
	frame = append(frame, res.Message...)
	_, err := w.Write(frame)
	return err
}

// ReadResult reads one frame. The error is io.EOF when nothing came before the
// end, io.ErrUnexpectedEOF when a part came.
func ReadResult(r io.Reader) (Result, error) {
	var header [headerSize]byte
	if _, err := io.ReadFull(r, header[:]); err != nil {
		return Result{}, err
	}
	if [4]byte(header[:4]) != magicResult {
		return Result{}, fmt.Errorf("magic: %w", ErrFormat)
	}
	size := binary.BigEndian.Uint16(header[4:])
	if size < minResult || size > maxResult {
		return Result{}, fmt.Errorf("result of %d bytes: %w", size, ErrFormat)
	}
	payload := make([]byte, size)
	if _, err := io.ReadFull(r, payload); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return Result{}, err
	}
	res := Result{
		Kind:    Kind(payload[0]),
		Cause:   Cause(payload[1]),
		Errno:   binary.BigEndian.Uint32(payload[2:6]),
		Message: string(payload[6:]),
	}
	if res.Kind < Ready || res.Kind > Failed || res.Cause > CauseExec {
		return Result{}, fmt.Errorf("result of kind %d, cause %d: %w", res.Kind, res.Cause, ErrFormat)
	}
	return res, nil
}
