// Package runtime says what a container is to workspaced: values and errors,
// no client. Drivers (runtime/ctrd, and runtimetest.Fake for tests) speak them,
// and server/workspace, which defines the interface that it calls, consumes
// them.
//
// # An instance's life
//
// An instance is one container of a workspace. A driver prepares it while the
// workspace's older instance still runs, up to a first process that has done
// nothing yet (standby). Starting it hands that process its environment, and it
// becomes the workspace's command (running). It ends by itself or is stopped
// (exited), and is removed. What a crash left half-made is a remnant: never to
// be started, only removed.
package runtime

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"maps"
	"regexp"
	"slices"
	"syscall"
	"time"
)

// Spec is what an instance is prepared from. It holds no secret.
type Spec struct {
	// InstanceID is what the instance is to be called, made by NewInstanceID; empty:
	// the driver calls it something.
	InstanceID string
	// WorkspaceID and WorkspaceUID say whose instance it is. The log, named
	// volumes and the like belong to the id; the uid tells a workspace from an
	// earlier one of the same id.
	WorkspaceID, WorkspaceUID string
	// Generation is the one that the spec belongs to.
	Generation int64
	// Image is a reference that EnsureImage has made present.
	Image string
	// Command replaces the image's entrypoint when it is not empty, and with it
	// the image's command.
	Command []string
	// Args replaces the image's command when it is not empty.
	Args []string
	// Env is the plain environment, `KEY=value`, as far as it is known now: it
	// decides how the command is looked up while preparing. Launch.Env is what
	// the command gets.
	Env []string
	// LaunchBytes is what Launch.Env takes of what execve accepts, as far as it is
	// known now: each variable's length and 9 bytes. It lets Prepare refuse what
	// would not fit together with the image's environment and the command.
	LaunchBytes int
	// FileBytes is what Launch.Files takes, as far as it is known now: the sum of
	// FileSize. It lets Prepare keep room for them.
	FileBytes int
	// WorkingDir is an absolute path; empty: the image's own.
	WorkingDir string
	// User is `user[:group]` by name or number; empty: the image's own.
	User string
	// Resources are limits; see PidsLimit for the one that counts.
	Resources Resources
	// Profile says what the processes may do to the machine.
	Profile Profile
	// Mounts come from outside the image.
	Mounts []Mount
	// ReadOnlyRoot mounts the root file system read-only.
	ReadOnlyRoot bool
	// API: the instance sees the directory of the daemon's socket for it as APIDir.
	API bool
}

// Where an instance of a Spec with API finds the daemon. The directory is mounted,
// and not the socket: a daemon that starts anew makes a new socket.
const (
	APIDir    = "/run/workspaced/api"
	APISocket = "api.sock" // in APIDir
)

var dashes = regexp.MustCompile(`-+`)

// NewInstanceID makes an id that no instance has, which is also its container's
// and snapshot's. A workspace id may hold "--", a container id may not.
func NewInstanceID(workspaceID string) string {
	var b [6]byte
	_, _ = rand.Read(b[:]) // never fails
	return dashes.ReplaceAllString(workspaceID, "-") + "-" + hex.EncodeToString(b[:])
}

// Resources limits an instance; 0 names no limit.
type Resources struct {
	CPUMillis   int64 // thousandths of a CPU
	MemoryBytes int64
	Pids        int64
}

// Mount is a directory from outside the image. Exactly one of HostPath and
// Volume is set.
type Mount struct {
	Path     string // in the container, absolute
	HostPath string // on the host, absolute, must exist, and lie within Policy.HostPaths
	Volume   string // a named volume of the workspace, made at first use
	ReadOnly bool
}

// Launch is what a standby instance needs to become the workspace's command. It
// holds secrets: it is never logged, stored or put into an error.
type Launch struct {
	// Generation is the one whose values Env holds; recorded with the instance
	// before it starts, so that a crashed daemon's successor knows.
	Generation int64
	// SecretVersions tells each secret's version, recorded likewise.
	SecretVersions map[string]int64
	// GlobalSecrets are the keys in SecretVersions that are global secrets, sorted;
	// recorded likewise.
	GlobalSecrets []string
	// Env is laid over the image's own environment, `KEY=value`; where a key
	// comes twice the later one counts.
	Env []string
	// Files are those in FilesDir, no name twice.
	Files []File
}

// Equal tells whether an instance would get and have on record the same by both.
func (l Launch) Equal(other Launch) bool {
	return l.Generation == other.Generation &&
		maps.Equal(l.SecretVersions, other.SecretVersions) && slices.Equal(l.GlobalSecrets, other.GlobalSecrets) &&
		slices.Equal(l.Env, other.Env) && slices.EqualFunc(l.Files, other.Files, File.Equal)
}

// Rotation is what a running instance takes in as it runs. It holds secrets, like a
// Launch.
type Rotation struct {
	// Generation is the one whose values Files hold; recorded with the instance once
	// it has all of them.
	Generation int64
	// SecretVersions tells the versions of Files, recorded likewise.
	SecretVersions map[string]int64
	// GlobalSecrets are the keys in SecretVersions that are global secrets, sorted;
	// recorded likewise.
	GlobalSecrets []string
	// Files are those in FilesDir from now on, no name twice.
	Files []File
	// Keep are names that stay as they are: the files, where there are such, and
	// their versions.
	Keep []string
	// Signal is what its first process gets once they are there; 0: none.
	Signal syscall.Signal
}

// GlobalsAfter returns Instance.GlobalSecrets after the rotation, from those of
// before and Instance.SecretVersions of after.
func (r *Rotation) GlobalsAfter(before []string, versions map[string]int64) []string {
	var after []string
	for _, key := range before {
		_, there := versions[key]
		if _, replaced := r.SecretVersions[key]; there && !replaced {
			after = append(after, key)
		}
	}
	after = append(after, r.GlobalSecrets...)
	slices.Sort(after)
	return after
}

// FilesDir is where an instance has its Files: a directory in memory that only its
// user can list, and that can't be written to from inside. Each is a symbolic link
// there.
const FilesDir = "/run/secrets"

// File is a file in FilesDir that only the instance's user can read.
type File struct {
	// Name matches FileName.
	Name string
	Data []byte
}

// Equal tells whether both have the same name and content.
func (f File) Equal(other File) bool { return f.Name == other.Name && bytes.Equal(f.Data, other.Data) }

// FileName matches the names that a File can have: those of variables, which
// leaves all that begin with a dot to drivers.
var FileName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]{0,127}$`)

// FileSize is the memory that a file takes, its directory's share included.
func FileSize(f File) int {
	const page = 4096
	return (len(f.Data)+page-1)/page*page + page
}

// Phase is where an instance is in its life.
type Phase int

// The phases. See the package comment.
const (
	// PhaseRemnant: half made, or a standby whose daemon is gone.
	PhaseRemnant Phase = iota
	// PhaseStandby: ready to be started by this daemon process.
	PhaseStandby
	// PhaseRunning: the command runs.
	PhaseRunning
	// PhaseExited: the command, which had been started, ended.
	PhaseExited
	// PhaseUnknown: it is there and could not be asked. Only List says so, beside an
	// error.
	PhaseUnknown
)

// String returns the phase's name in lower case.
func (p Phase) String() string {
	switch p {
	case PhaseStandby:
		return "standby"
	case PhaseRunning:
		return "running"
	case PhaseExited:
		return "exited"
	case PhaseUnknown:
		return "unknown"
	default:
		return "remnant"
	}
}

// Instance is what is known of one container.
type Instance struct {
	ID                        string
	WorkspaceID, WorkspaceUID string
	Phase                     Phase
	// PreparedGeneration is its Spec's.
	PreparedGeneration int64
	// Generation, SecretVersions and GlobalSecrets are its Launch's, or those of the
	// newest Rotation and, for what is no file or was kept, of before; 0 and nil before
	// the launch.
	Generation     int64
	SecretVersions map[string]int64
	GlobalSecrets  []string
	// ImageDigest is the digest of the image it was made from.
	ImageDigest string
	// PID is its first process as the host counts; 0 when there is none.
	PID int
	// StartTime is when it got its Launch.
	StartTime time.Time
	// Exit is set in PhaseExited.
	Exit *Exit
	// Stopped: it was told to end, by Runtime.Stop. Its end is not its own doing.
	Stopped bool
}

// Exit tells how an instance ended.
type Exit struct {
	// Code is the exit code, or 128 + signal. It means nothing unless Known.
	Code int
	// Known is false when the instance ended while nobody watched.
	Known bool
	// Signal is the number of the signal that ended it, or 0.
	Signal int
	// OOMKilled: the kernel ended it for want of memory.
	OOMKilled bool
	// Time is when it ended, as exactly as is known.
	Time time.Time
}

// ErrNotFound: there is definitely no such instance. No other error says so:
// an error while asking is not an answer.
var ErrNotFound = errors.New("no such instance")

// ErrNotRunning: the instance is there and does not run, or not any more. List tells
// more.
var ErrNotRunning = errors.New("instance does not run")

// Reason names in one word why something could not be done. Callers of the API
// see it as Workspace.last_error.reason.
type Reason string

// The reasons that drivers give.
const (
	ReasonImageNotFound        Reason = "IMAGE_NOT_FOUND"            // the registry knows no such image
	ReasonImagePullFailed      Reason = "IMAGE_PULL_FAILED"          // it could not be fetched or unpacked
	ReasonImageInvalid         Reason = "IMAGE_INVALID"              // reference or content make no sense
	ReasonCommandMissing       Reason = "COMMAND_MISSING"            // neither spec nor image name one
	ReasonCommandNotFound      Reason = "COMMAND_NOT_FOUND"          // it does not exist in the image
	ReasonCommandNotExecutable Reason = "COMMAND_NOT_EXECUTABLE"     // it is not executable by the user
	ReasonWrongArchitecture    Reason = "COMMAND_WRONG_ARCHITECTURE" // made for another machine, or no program
	ReasonWorkingDir           Reason = "WORKING_DIR_NOT_FOUND"      // it does not exist or is no directory
	ReasonUserNotFound         Reason = "USER_NOT_FOUND"             // the image has no such user or group
	ReasonVolume               Reason = "VOLUME_UNAVAILABLE"         // a host path does not exist, or a volume can't be made
	ReasonNotAllowed           Reason = "NOT_ALLOWED"                // the daemon's settings don't allow what the spec asks of the machine
	ReasonEnvironmentTooLarge  Reason = "ENVIRONMENT_TOO_LARGE"      // more than the kernel takes
	ReasonExecFailed           Reason = "EXEC_FAILED"                // execve said no, after every check said yes
	ReasonStartInterrupted     Reason = "START_INTERRUPTED"          // the first process ended before it became the command
	ReasonStorage              Reason = "STORAGE_UNAVAILABLE"        // a disk of this machine is full, read-only or broken
	ReasonRuntimeUnavailable   Reason = "RUNTIME_UNAVAILABLE"        // containerd does not answer
	ReasonTimeout              Reason = "TIMEOUT"                    // a step took longer than its deadline
	ReasonRuntimeError         Reason = "RUNTIME_ERROR"              // anything else the runtime says
)

// Error is an error with a reason and a message that a caller of the API may
// read. Drivers return it from every method where they know the reason.
type Error struct {
	Reason Reason
	// Message names the cause in words. Never a secret value.
	Message string
	// Permanent: the same instance spec can't succeed at the next try either.
	Permanent bool
	// Err is the inner error, for the log; may be nil.
	Err error
}

// Error returns reason and message, without the inner error's text.
func (e *Error) Error() string { return string(e.Reason) + ": " + e.Message }

// Unwrap returns the inner error.
func (e *Error) Unwrap() error { return e.Err }
