package workspace

import (
	"context"
	"syscall"
	"time"

	"github.com/workspaced/workspaced/runtime"
)

// Runtime is what the actors ask of containers. Every method may be called from
// many goroutines at once, ends when ctx does, can be repeated after it failed
// half way, and returns a *runtime.Error where it knows the reason. An instance
// is only ever touched by the actor of its workspace, or, when its uid is no
// workspace's, by Supervisor.Sweep.
type Runtime interface {
	// EnsureImage makes the image present, pulling it if it is not, and returns
	// its digest. Calls for the same image may share one pull.
	EnsureImage(ctx context.Context, ref string) (digest string, err error)
	// Prepare makes a new instance of the spec, up to PhaseStandby: its first
	// process runs and waits, having checked as far as it can that the command
	// can be executed. After an error nothing of the instance is left, or List
	// reports the rest as PhaseRemnant.
	Prepare(ctx context.Context, spec runtime.Spec) (runtime.Instance, error)
	// Arm tells a standby instance what its launch will be unless a change comes in
	// between, while an older instance still runs: what can be refused of it is
	// refused now, and what can be made of it is made now, so that Start has the less
	// to do. It says nothing to the first process. The launch must not be changed
	// afterwards. After an error the instance is a standby as before, unless it has
	// ended, with nothing of it ready; runtime.ErrNotFound when there is none.
	Arm(ctx context.Context, id string, launch runtime.Launch) error
	// Start hands a standby instance its environment and returns once the
	// command was executed. The generation and the secret versions are on
	// record before the command can run. After an error the instance never
	// starts later: it is a remnant or has ended.
	Start(ctx context.Context, id string, launch runtime.Launch) (runtime.Instance, error)
	// Rotate makes a running instance's files those of the rotation, all of them at
	// once, sends the signal, and records the generation. One that has the generation
	// or a later one, on record, is left as it is. A call that is repeated, by the
	// next daemon too, may send the signal again; after an error the files are those
	// of before or the new ones. runtime.ErrNotRunning when it does not run,
	// runtime.ErrNotFound when there is no such instance; a *runtime.Error that is
	// Permanent when only a new instance can have files.
	Rotate(ctx context.Context, id string, rotation runtime.Rotation) (runtime.Instance, error)
	// Stop sends the signal, after grace SIGKILL, and returns once the instance's
	// first process, and with it all of them, is gone. An instance that has
	// ended already is no error; runtime.ErrNotFound when there is none.
	Stop(ctx context.Context, id string, signal syscall.Signal, grace time.Duration) error
	// Watch calls ended once, in another goroutine or before it returns, when a
	// running instance has ended, with how it did, which List tells from then on.
	// ended must not block. stop ends the watch; no call of ended begins or goes on
	// after it. ctx bounds Watch itself and not what it watches.
	// runtime.ErrNotFound when there is no such instance; any other error says
	// nothing about the instance.
	Watch(ctx context.Context, id string, ended func(runtime.Exit)) (stop func(), err error)
	// Remove ends an instance at once if it runs and removes all that is left of
	// it. One that is not there is no error.
	Remove(ctx context.Context, id string) error
	// List returns the instances of the workspace uid, or of all this daemon's
	// workspaces when uid is empty, oldest first. One that can't be asked is there
	// as PhaseUnknown, beside an error.
	List(ctx context.Context, uid string) ([]runtime.Instance, error)
	// Foreign counts the containers that are kept where this daemon keeps its own
	// but are another one's, by the instance uid of that one's database; under ""
	// those that carry none.
	Foreign(ctx context.Context) (map[string]int, error)
	// RemoveWorkspace removes what outlives instances: log and, unless kept, named
	// volumes. What is not there is no error.
	RemoveWorkspace(ctx context.Context, id, uid string, keepVolumes bool) error
}
