package e2e

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/workspaced/workspaced/cmd/internal/lab"
	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
)

// fleet is a stage with workspaces whose containers keep a journal, and what was
// asked of them: after any fault they have to be what was asked for.
type fleet struct {
	*stage
	prefix string
	asked  map[string]*asked // by name, without the prefix
	read   map[string]int    // entries of the journal that were looked at
	last   map[string]start  // the last one of them

	counter int // makes values and images that there were not before
}

// on lets s report to a subtest.
func (s *fleet) on(t *testing.T) {
	s.stage = &stage{Stage: s.Stage, t: t, ctx: s.ctx}
	t.Cleanup(func() {
		if t.Failed() { // at the end of the whole test it would be long out of sight
			t.Logf("daemon's log:\n%s", s.Daemon.LogTail())
		}
	})
}

func (s *fleet) next() string {
	s.counter++
	return fmt.Sprint(s.counter)
}

// asked is what callers asked of one workspace.
type asked struct {
	exists  bool
	parked  bool
	secrets map[string]string
	files   map[string]string
	// live: its container runs since before the newest generation.
	live bool
	// unsure is a change whose caller got no answer, since the daemon died: it
	// came about, or it did not.
	unsure func(*asked)
	// degraded: its newest spec can't be started, an older one runs.
	degraded bool
	// ended is the state of one whose container ended by itself and is not started
	// again; 0: it is meant to run.
	ended workspacev1.WorkspaceState
	// again: the same generation may be started again, its container ended.
	again bool
}

func (a *asked) clone() *asked {
	b := *a
	b.secrets, b.files = maps.Clone(a.secrets), maps.Clone(a.files)
	b.unsure = nil
	return &b
}

// newFleet starts a stage with the daemon that fails on purpose, a containerd
// that is not its child, and everything in memory.
func newFleet(t *testing.T, timeout time.Duration, opts lab.Options) *fleet {
	t.Helper()
	opts.Tmpfs = true
	return &fleet{
		stage:  newStageOpts(t, timeout, opts),
		prefix: fmt.Sprintf("t%06x-", rand.N(1<<24)),
		asked:  map[string]*asked{},
		read:   map[string]int{},
		last:   map[string]start{},
	}
}

func (s *fleet) id(name string) string { return s.prefix + name }

// add makes a workspace of the fleet, and does not wait for it.
func (s *fleet) add(name string, secrets map[string]string, volumes ...*workspacev1.Volume) {
	s.t.Helper()
	spec := s.fleetSpec(name)
	spec.Volumes = append(spec.Volumes, volumes...)
	req := &workspacev1.CreateWorkspaceRequest{WorkspaceId: s.id(name), Workspace: &workspacev1.Workspace{Spec: spec}}
	for key, value := range secrets {
		req.Secrets = append(req.Secrets, &workspacev1.SecretValue{Key: key, Payload: &workspacev1.SecretValue_Text{Text: value}})
	}
	s.asked[name] = &asked{}
	s.ask(name, func(ctx context.Context) error {
		_, err := s.client().CreateWorkspace(ctx, req)
		return err
	}, func(a *asked) { *a = asked{exists: true, secrets: maps.Clone(secrets)} })
}

// fleetSpec is a workspace's that keeps a journal.
func (s *fleet) fleetSpec(name string) *workspacev1.WorkspaceSpec {
	spec := s.spec(s.id(name))
	spec.Env["ENVSERVER_JOURNAL"] = "/demo/" + s.id(name) + ".journal"
	// Go ends at once when it is told to by SIGTERM before it listens: there was a
	// container then that is in no journal. This one it does not hear.
	spec.StopSignal = "SIGUSR1"
	spec.StopGracePeriod = durationpb.New(2 * time.Second)
	return spec
}

// ask calls the daemon, and keeps in mind what it was asked for. An answer that
// does not come, since the daemon dies, leaves both possible.
func (s *fleet) ask(name string, call func(context.Context) error, effect func(*asked)) {
	s.t.Helper()
	a := s.asked[name]
	ctx, cancel := context.WithTimeout(s.ctx, 30*time.Second)
	defer cancel()
	switch err := call(ctx); status.Code(err) {
	case codes.OK:
		effect(a)
	case codes.Unavailable:
		if a.unsure != nil {
			s.t.Errorf("%s: two changes without an answer", name)
		}
		a.unsure = effect
	default:
		s.t.Errorf("%s: %v", name, err)
	}
}

func (s *fleet) setSecret(name, key, value string) {
	s.t.Helper()
	s.ask(name, func(ctx context.Context) error {
		_, err := s.client().SetSecret(ctx, setSecret(s.id(name), key, value))
		return err
	}, func(a *asked) { a.secrets[key], a.live = value, false })
}

// setFile sets a secret that is a file, for the container that runs if apply says so.
func (s *fleet) setFile(name, key, value string, apply workspacev1.Apply) {
	s.t.Helper()
	s.ask(name, func(ctx context.Context) error {
		req := setSecret(s.id(name), key, value)
		req.Delivery, req.Apply = workspacev1.SecretDelivery_SECRET_DELIVERY_FILES, apply
		_, err := s.client().SetSecret(ctx, req)
		return err
	}, func(a *asked) {
		if a.files == nil {
			a.files = map[string]string{}
		}
		a.files[key], a.live = value, apply == workspacev1.Apply_APPLY_LIVE
	})
}

func (s *fleet) park(name string) {
	s.t.Helper()
	s.ask(name, func(ctx context.Context) error {
		_, err := s.client().StopWorkspace(ctx, &workspacev1.StopWorkspaceRequest{Name: "workspaces/" + s.id(name)})
		return err
	}, func(a *asked) { a.parked = true })
}

func (s *fleet) unpark(name string) {
	s.t.Helper()
	s.ask(name, func(ctx context.Context) error {
		_, err := s.client().StartWorkspace(ctx, &workspacev1.StartWorkspaceRequest{Name: "workspaces/" + s.id(name)})
		return err
	}, func(a *asked) { a.parked = false })
}

func (s *fleet) remove(name string) {
	s.t.Helper()
	s.ask(name, func(ctx context.Context) error {
		_, err := s.client().DeleteWorkspace(ctx, &workspacev1.DeleteWorkspaceRequest{Name: "workspaces/" + s.id(name)})
		return err
	}, func(a *asked) { a.exists = false })
}

// change changes fields of a workspace's spec.
func (s *fleet) change(name string, spec *workspacev1.WorkspaceSpec, paths ...string) {
	s.t.Helper()
	s.ask(name, func(ctx context.Context) error {
		_, err := s.client().UpdateWorkspace(ctx, updateSpec(s.id(name), spec, paths...))
		return err
	}, func(*asked) {})
}

// verify waits until every workspace is what was asked for, and nothing else is
// there, and returns their records by name.
func (s *fleet) verify() map[string]*workspacev1.Workspace {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.ctx, 40*time.Second)
	defer cancel()
	records := map[string]*workspacev1.Workspace{}
	world := lab.World{Prefix: s.prefix, Running: map[string]lab.Container{}}
	for _, name := range slices.Sorted(maps.Keys(s.asked)) {
		w := s.await(name)
		if w == nil {
			continue
		}
		records[name] = w
		world.Workspaces = append(world.Workspaces, w.Name[len("workspaces/"):])
		if w.ContainerId != "" {
			world.Running[w.ContainerId] = lab.Container{Workspace: s.id(name), PID: int(w.Pid)}
		}
	}
	if err := s.Daemon.WaitNoStrays(ctx, world); err != nil {
		s.t.Fatal(err)
	}
	for name := range s.asked {
		s.checkJournal(name)
	}
	return records
}

// await waits until a workspace is what was asked for; nil: it is gone.
func (s *fleet) await(name string) (w *workspacev1.Workspace) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.ctx, 40*time.Second)
	defer cancel()
	s.poll(ctx, func() (err error) {
		w, err = s.look(ctx, name)
		return err
	})
	return w
}

// look compares one workspace with what was asked for. It returns nil for one
// that is gone, and an error as long as it is not what it should be.
func (s *fleet) look(ctx context.Context, name string) (*workspacev1.Workspace, error) {
	a := s.asked[name]
	err := s.compare(ctx, name, a)
	if err.err != nil && a.unsure != nil {
		b := a.clone()
		a.unsure(b)
		if other := s.compare(ctx, name, b); other.err == nil {
			err, *a = other, *b
		}
	}
	if err.err == nil {
		a.unsure = nil
	}
	return err.record, err.err
}

type comparison struct {
	record *workspacev1.Workspace
	err    error
}

func (s *fleet) compare(ctx context.Context, name string, a *asked) (c comparison) {
	fail := func(format string, args ...any) comparison {
		c.err = fmt.Errorf("%s %s: %v", name, fmt.Sprintf(format, args...), c.record)
		return c
	}
	resp, err := s.client().GetWorkspace(ctx, &workspacev1.GetWorkspaceRequest{Name: "workspaces/" + s.id(name)})
	switch {
	case status.Code(err) == codes.NotFound && !a.exists:
		return c
	case err != nil:
		return fail("can't be asked for: %v", err)
	case !a.exists:
		return fail("is still there")
	}
	c.record = resp.Workspace
	w := c.record
	if a.ended != 0 {
		if w.State != a.ended || w.ContainerId != "" {
			return fail("is not %v", a.ended)
		}
		return c
	}
	if a.parked {
		if w.State != stopped || w.ContainerId != "" || w.Reconciling {
			return fail("is not stopped")
		}
		return c
	}
	calm := w.State == running && !w.Reconciling && w.ObservedGeneration == w.Generation && w.LastError == nil
	if a.degraded {
		calm = w.State == degraded && w.Reconciling && w.ObservedGeneration < w.Generation && w.LastError != nil
	}
	if !calm {
		return fail("is not what was asked for")
	}
	seen, err := lab.Inside(ctx, s.Socket(s.id(name)))
	if err != nil {
		return fail("does not answer: %v", err)
	}
	if seen.Env["WORKSPACE_GENERATION"] != fmt.Sprint(w.ObservedGeneration) && !a.live {
		return fail("answers with generation %s", seen.Env["WORKSPACE_GENERATION"])
	}
	own := map[string]string{}
	for key, value := range seen.Env {
		if _, plain := plainEnv[key]; !plain {
			own[key] = value
		}
	}
	if !maps.Equal(own, a.secrets) {
		return fail("sees %v, was given %v", own, a.secrets)
	}
	files, err := lab.Files(ctx, s.Socket(s.id(name)))
	if err != nil || !maps.Equal(files, a.files) {
		return fail("sees the files %v, %v, was given %v", files, err, a.files)
	}
	return c
}

// plainEnv are the variables that are no secrets.
var plainEnv = map[string]bool{
	"PATH": true, "HOME": true, "HOSTNAME": true, "ENVSERVER_SOCKET": true, "ENVSERVER_JOURNAL": true,
	"WORKSPACE_ID": true, "WORKSPACE_UID": true, "WORKSPACE_GENERATION": true,
}

// start is an entry of a journal: the start of a program, or that it was told to
// end.
type start struct {
	ID    string
	Time  time.Time
	Ends  bool
	Alone bool
	Env   map[string]string
}

// journal returns the entries of a workspace's journal since the last call.
func (s *fleet) journal(name string) (starts []start) {
	s.t.Helper()
	f, err := os.Open(filepath.Join(s.VolumeDir, s.id(name)+".journal"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		s.t.Fatal(err)
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 4<<20)
	n := 0
	for ; lines.Scan(); n++ {
		if n < s.read[name] {
			continue
		}
		var entry start
		if err := json.Unmarshal(lines.Bytes(), &entry); err != nil {
			s.t.Fatalf("journal of %s: %v", name, err)
		}
		starts = append(starts, entry)
	}
	if err := lines.Err(); err != nil {
		s.t.Fatal(err)
	}
	s.read[name] = n
	return starts
}

func (e start) generation() int {
	n, _ := strconv.Atoi(e.Env["WORKSPACE_GENERATION"]) // 0 is older than any
	return n
}

// checkJournal checks that no two containers of a workspace ran at once, and that
// no generation was started twice, or after a newer one.
func (s *fleet) checkJournal(name string) {
	s.t.Helper()
	for _, entry := range s.journal(name) {
		if entry.Ends {
			continue
		}
		if !entry.Alone {
			s.t.Errorf("%s: two containers ran at once, the second was %v", name, entry.Env)
		}
		last := s.last[name]
		if last.Env["WORKSPACE_UID"] == entry.Env["WORKSPACE_UID"] {
			again := entry.generation() == last.generation() && s.asked[name].again
			if entry.generation() <= last.generation() && !again {
				s.t.Errorf("%s: generation %d was started after %d", name, entry.generation(), last.generation())
			}
		}
		s.last[name] = entry
	}
	s.asked[name].again = false
}
