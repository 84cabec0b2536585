package runtimetest

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/workspaced/workspaced/runtime"
)

// Fake is a runtime in memory: images, instances with their phases, logs and
// volumes, all of it real but for the processes. It is deterministic, safe for
// concurrent use, and works in a testing/synctest bubble when it is made inside
// the bubble: what waits in it waits on channels, timers and contexts.
//
// A Fake is the world that outlives a daemon. Its methods of Runtime belong to
// the daemon that is alive when they are called; Daemon gives a handle that
// belongs to the present daemon for good, and Crash ends that daemon.
type Fake struct {
	before, after hooks
	anyImage      bool
	policy        runtime.Policy // guarded by mu

	mu         sync.Mutex // never held while waiting or in a hook
	daemon     *Daemon
	registry   map[string]Image
	images     map[string]Image // those that are present
	missing    map[string]bool  // host paths
	instances  map[string]*instance
	byUID      map[string][]*instance                  // oldest first
	prepared   int                                     // instances so far
	numbers    map[string]int                          // of the last instance, by workspace id
	logs       map[string]bool                         // by workspace id
	volumes    map[string]map[string]map[string]string // workspace id, volume: files
	hostFiles  map[string]map[string]string            // host path: files
	gone       map[string]bool                         // removed workspaces, by uid
	foreign    map[string]int                          // containers of other daemons, by their uids
	launches   []Launched
	calls      []Call
	busy       map[string]busy // instances that a call changes now
	violations []string
}

// instance is what the Fake knows of one.
type instance struct {
	runtime.Instance
	spec     runtime.Spec
	image    Image
	cmd      Command
	argv     []string
	files    map[string]string
	secrets  map[string]string // in runtime.FilesDir
	armed    *runtime.Launch
	number   int              // counts all instances
	died     bool             // its first process ended before it was started
	gone     chan struct{}    // closed when there is no process any more
	signals  []syscall.Signal // by Rotate
	stopping bool             // a signal was sent that ends it in a while
	unknown  error            // why it can't be asked
	watchers []*watcher       // of its end
}

type busy struct {
	daemon *Daemon
	method Method
}

// Launched is a command that was started.
type Launched struct {
	Instance runtime.Instance // as Start returned it
	Spec     runtime.Spec
	Argv     []string // with the image's entrypoint and command
	Env      []string // with the image's
	Files    []runtime.File
	Armed    bool // it was armed with just this launch
}

// Image is an image that a Fake can pull. The zero value is one in which every
// user, directory and command exists.
type Image struct {
	// Digest is made from the reference when it is empty.
	Digest string
	// Env, Entrypoint, Cmd, User and WorkingDir are the image's configuration.
	Env, Entrypoint, Cmd []string
	User, WorkingDir     string
	// Users are the users and groups that exist, Dirs the directories; nil is any.
	Users, Dirs []string
	// Commands says how a command behaves, by its first word. One that is not
	// listed works and ends at once when it is told to.
	Commands map[string]Command
	// Exact: commands that are not in Commands do not exist.
	Exact bool
}

// Command is how a command behaves.
type Command struct {
	// PrepareErr is what Prepare finds wrong with it.
	PrepareErr error
	// StartErr is what execve says, after Prepare found nothing wrong.
	StartErr error
	// Exit is how it ends by itself, Lifetime after its start; nil: it does not.
	Exit     *runtime.Exit
	Lifetime time.Duration
	// StopDelay is how long it takes to end after a signal; negative: only SIGKILL
	// ends it.
	StopDelay time.Duration
}

// ExecFailure is a Command that passes Prepare and fails in Start.
var ExecFailure = Command{StartErr: &runtime.Error{
	Reason: runtime.ReasonExecFailed, Message: "the command can't be executed", Permanent: true,
}}

// Option configures a Fake.
type Option func(*Fake)

// AllowAnyImage lets every image exist. Without it only those do that AddImage
// has added.
func AllowAnyImage() Option { return func(f *Fake) { f.anyImage = true } }

// SetPolicy says what specs may ask of the machine from now on: everything, until
// this says otherwise.
func (f *Fake) SetPolicy(p runtime.Policy) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.policy = p
}

// NewFake returns a Fake in which nothing exists.
func NewFake(options ...Option) *Fake {
	f := &Fake{
		policy:    runtime.Policy{AllowPrivileged: true, HostPaths: []string{"/"}},
		registry:  make(map[string]Image),
		images:    make(map[string]Image),
		missing:   make(map[string]bool),
		numbers:   make(map[string]int),
		logs:      make(map[string]bool),
		volumes:   make(map[string]map[string]map[string]string),
		hostFiles: make(map[string]map[string]string),
		gone:      make(map[string]bool),
		foreign:   make(map[string]int),
		instances: make(map[string]*instance),
		byUID:     make(map[string][]*instance),
		busy:      make(map[string]busy),
	}
	for _, o := range options {
		o(f)
	}
	f.daemon = newDaemon(f)
	return f
}

// AddImage makes an image exist for EnsureImage to pull, in place of an earlier
// one of the same reference. An earlier one that was pulled stays as it is.
func (f *Fake) AddImage(ref string, image Image) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if image.Digest == "" {
		image.Digest = digest(ref)
	}
	f.registry[ref] = image
}

// RemoveImage makes an image cease to exist; where it was pulled it stays.
func (f *Fake) RemoveImage(ref string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.registry, ref)
}

func digest(ref string) string { return fmt.Sprintf("sha256:%x", sha256.Sum256([]byte(ref))) }

// SetHostPathMissing says whether a host path is missing. None is unless this
// says so.
func (f *Fake) SetHostPathMissing(path string, missing bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.missing[path] = missing
}

// SetForeign says how many containers of another daemon there are, by its
// instance uid; "" is for those that name no daemon.
func (f *Fake) SetForeign(instanceUID string, n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.foreign[instanceUID] = n
	if n <= 0 {
		delete(f.foreign, instanceUID)
	}
}

// Daemon returns the daemon that is alive now. After Crash its calls fail and
// have no effect, for ever; a test that lets a crashed daemon's goroutines run
// on gives each daemon its own.
func (f *Fake) Daemon() *Daemon {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.daemon
}

// Crash ends the daemon as SIGKILL would. Its calls that are in flight end with
// an error and have no later effect, its standbys become remnants, and what runs
// goes on running. The next daemon finds the same world.
func (f *Fake) Crash() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.daemon.crash()
	f.daemon = newDaemon(f)
	for _, in := range f.instances {
		if in.Phase == runtime.PhaseStandby {
			in.toRemnant()
		}
	}
}

// Exit makes an instance end by itself, and reports whether it had a process. A
// running one has then exited as exit says (with the present time when it names
// none), and a standby's is a remnant.
func (f *Fake) Exit(instanceID string, exit runtime.Exit) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	in := f.instances[instanceID]
	switch {
	case in == nil:
		return false
	case in.Phase == runtime.PhaseRunning:
		in.toExited(exit)
		return true
	case in.Phase == runtime.PhaseStandby:
		in.died = true
		in.toRemnant()
		return true
	}
	return false
}

// Env returns the environment that an instance's command was started with,
// nil when it was not started. It still knows those that were removed.
func (f *Fake) Env(instanceID string) []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, l := range f.launches {
		if l.Instance.ID == instanceID {
			return slices.Clone(l.Env)
		}
	}
	return nil
}

// Signals returns the signals that Rotate has sent to an instance's command.
func (f *Fake) Signals(instanceID string) []syscall.Signal {
	f.mu.Lock()
	defer f.mu.Unlock()
	if in := f.instances[instanceID]; in != nil {
		return slices.Clone(in.signals)
	}
	return nil
}

// Files returns an instance's files in runtime.FilesDir by name; nil when there is
// no such instance.
func (f *Fake) Files(instanceID string) map[string]string {
	f.mu.Lock()
	defer f.mu.Unlock()
	if in := f.instances[instanceID]; in != nil {
		return maps.Clone(in.secrets)
	}
	return nil
}

// Running returns the instance that runs for a workspace, given by id or uid.
func (f *Fake) Running(workspace string) (runtime.Instance, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, in := range f.instances {
		if in.Phase == runtime.PhaseRunning && (in.WorkspaceID == workspace || in.WorkspaceUID == workspace) {
			return in.snapshot(), true
		}
	}
	return runtime.Instance{}, false
}

// Instances returns all instances, oldest first: List without hooks.
func (f *Fake) Instances() []runtime.Instance {
	f.mu.Lock()
	defer f.mu.Unlock()
	var list []runtime.Instance
	for _, in := range f.ordered("") {
		list = append(list, in.snapshot())
	}
	return list
}

// FailAsking makes List unable to ask an instance: it is there as PhaseUnknown,
// beside the error. The returned func ends it.
func (f *Fake) FailAsking(instanceID string, err error) (heal func()) {
	set := func(err error) {
		f.mu.Lock()
		defer f.mu.Unlock()
		if in := f.instances[instanceID]; in != nil {
			in.unknown = err
		}
	}
	set(err)
	return func() { set(nil) }
}

func (f *Fake) list(uid string) (list []runtime.Instance, unknown error) {
	var errs []error
	for _, in := range f.ordered(uid) {
		s := in.snapshot()
		if in.unknown != nil {
			s.Phase, s.PID, s.Exit = runtime.PhaseUnknown, 0, nil
			errs = append(errs, fmt.Errorf("instance %s: %w", in.ID, in.unknown))
		}
		list = append(list, s)
	}
	return list, errors.Join(errs...)
}

// ordered returns a workspace's instances, all when uid is empty, oldest first.
func (f *Fake) ordered(uid string) []*instance {
	instances := f.byUID[uid]
	if uid == "" {
		instances = slices.SortedFunc(maps.Values(f.instances), func(a, b *instance) int { return a.number - b.number })
	}
	return instances
}

// Launches returns every command that was ever started for a workspace, given by
// id or uid ("": all), in order. What
// they point to must not be changed.
func (f *Fake) Launches(workspace string) []Launched {
	f.mu.Lock()
	defer f.mu.Unlock()
	var list []Launched
	for _, l := range f.launches {
		if workspace == "" || l.Instance.WorkspaceID == workspace || l.Instance.WorkspaceUID == workspace {
			list = append(list, l)
		}
	}
	return list
}

// Calls returns the log of calls, those in flight included, in the order in
// which they began.
func (f *Fake) Calls() []Call {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.calls)
}

// Count returns how many calls of the method have begun that concern the target
// (see Fail).
func (f *Fake) Count(method Method, target string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := 0
	for _, c := range f.calls {
		if c.is(method, target) {
			n++
		}
	}
	return n
}

// Violations returns what the callers did that no daemon may do: two instances
// of one workspace running at once, a start of what is no standby, two calls at
// once that change one instance, an instance for a workspace that was removed.
// A test wants none.
func (f *Fake) Violations() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.violations)
}

func (f *Fake) violation(format string, args ...any) {
	f.violations = append(f.violations, fmt.Sprintf(format, args...))
}

// HasLog reports whether a workspace has a log.
func (f *Fake) HasLog(workspaceID string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.logs[workspaceID]
}

// Volumes returns the names of a workspace's volumes, sorted.
func (f *Fake) Volumes(workspaceID string) []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Sorted(maps.Keys(f.volumes[workspaceID]))
}

// snapshot returns a copy that shares nothing.
func (in *instance) snapshot() runtime.Instance {
	s := in.Instance
	s.SecretVersions = maps.Clone(s.SecretVersions)
	s.GlobalSecrets = slices.Clone(s.GlobalSecrets)
	if s.Exit != nil {
		exit := *s.Exit
		s.Exit = &exit
	}
	return s
}

// toRemnant ends a process that had not become the command.
func (in *instance) toRemnant() {
	in.Phase = runtime.PhaseRemnant
	in.PID = 0
	close(in.gone)
}

// toExited ends a command.
func (in *instance) toExited(exit runtime.Exit) {
	if exit.Time.IsZero() {
		exit.Time = time.Now()
	}
	in.Phase = runtime.PhaseExited
	in.PID = 0
	in.Exit = &exit
	close(in.gone)
	for _, w := range in.watchers {
		w.tell(exit)
	}
	in.watchers = nil
}

// environment lays the launch's over the image's; the later of two wins.
func environment(layers ...[]string) []string {
	var env []string
	at := make(map[string]int)
	for _, kv := range slices.Concat(layers...) {
		key, _, _ := strings.Cut(kv, "=")
		if i, ok := at[key]; ok {
			env[i] = kv
			continue
		}
		at[key] = len(env)
		env = append(env, kv)
	}
	return env
}
