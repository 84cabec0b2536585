package sim

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing/synctest"
	"time"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
	"github.com/workspaced/workspaced/runtime/runtimetest"
	"github.com/workspaced/workspaced/server/servertest/internal/daemon"
	"github.com/workspaced/workspaced/store"
)

// scene is a world with clients and watchers that check what they are told.
type scene struct {
	*world
	ledger *ledger
	cycles *cycles
	uids   map[string]string // of the stable workspaces

	mu       sync.Mutex
	ended    map[string]ending    // by instance
	changed  map[string]committed // by workspace: what was told last
	watchers []*watcher
}

// committed is a commit that actors and watchers were told of.
type committed struct {
	at       time.Time
	revision uint64
}

// ending is why an instance ended.
type ending int

const (
	endNone ending = iota
	endStop        // the daemon stopped it
	endExit        // by itself
)

func newScene(p *plan, dir string) (*scene, error) {
	w, err := newWorld(p, dir, 2)
	if err != nil {
		return nil, err
	}
	s := &scene{
		world: w, ledger: newLedger(), cycles: newCycles(w.tick), uids: make(map[string]string),
		ended: make(map[string]ending), changed: make(map[string]committed),
	}
	w.noteEnd = s.noteEnd
	w.onBoot = s.booted
	w.onCommit = func(changes []store.Change) {
		s.mu.Lock()
		defer s.mu.Unlock()
		for _, c := range changes {
			s.changed[c.ID] = committed{time.Now(), c.Revision}
		}
	}
	w.onDown = func() {
		synctest.Wait() // callers have noticed
		s.ledger.barrier(s.tick())
	}
	w.watchCalls(s.beforeCall, s.afterCall)
	return s, nil
}

// setup makes the stable workspaces, before anything can fail.
func (s *scene) setup() error {
	if err := s.boot(); err != nil {
		return err
	}
	for _, scope := range append(slices.Clone(s.plan.stable), "") {
		for _, key := range allKeys {
			s.ledger.ended(s.ledger.begin(secretRegister(scope, key), "", 0, false), acked, 0)
		}
	}
	for _, id := range s.plan.stable {
		for field, value := range initial("a") {
			s.ledger.ended(s.ledger.begin(fieldRegister(id, field), value, 0, false), acked, 0)
		}
		r, err := s.api(0).CreateWorkspace(context.Background(), &workspacev1.CreateWorkspaceRequest{
			WorkspaceId: id, Workspace: newWorkspace(id, "a"),
		})
		if err != nil {
			return err
		}
		s.uids[id] = r.GetWorkspace().GetUid()
		if err := s.ledger.told(generationCounter(s.uids[id]), r.GetGeneration(), 0, true); err != nil {
			return err
		}
	}
	synctest.Wait()
	return nil
}

// play runs the whole plan.
func (s *scene) play() error {
	if err := s.setup(); err != nil {
		return fmt.Errorf("setup: %w", err)
	}
	s.faults.enable()
	for i := range s.plan.watchers {
		s.startWatcher(i)
	}
	var clients sync.WaitGroup
	for i, ops := range s.plan.clients {
		c := &client{scene: s, id: i, api: s.api(i), told: make(map[string]int64), values: make(map[string]map[int64]string)}
		for _, id := range s.plan.stable {
			c.told[id] = 1
		}
		clients.Go(func() { c.run(ops) })
	}
	done := make(chan struct{})
	go func() {
		clients.Wait()
		close(done)
	}()
	err := s.conduct(s.plan.events, done)
	if err == nil {
		err = s.calm()
	}
	if err == nil {
		s.checkAll()
	}
	s.stopWatchers()
	return err
}

func (s *scene) uidOf(ws string) string { return s.uids[ws] }

func (s *scene) isStable(ws string) bool { return slices.Contains(s.plan.stable, ws) }

// tracked reports whether the ledger knows the registers of a scope.
func (s *scene) tracked(ws string) bool { return ws == "" || s.isStable(ws) }

func (s *scene) noteEnd(instance string, e ending) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ended[instance] = max(s.ended[instance], e)
}

func (s *scene) beforeCall(ctx context.Context, c runtimetest.Call) error {
	if !isOurs(ctx) {
		s.cycles.before(c)
	}
	return nil
}

// afterCall runs after an effect, and before any fault can hide it.
func (s *scene) afterCall(ctx context.Context, c runtimetest.Call) error {
	if isOurs(ctx) || c.WorkspaceUID == "" {
		return nil
	}
	s.cycles.after(c, s.ledger.floor(generationCounter(c.WorkspaceUID)))
	switch c.Method {
	case runtimetest.Start:
		s.checkLaunch(c)
	case runtimetest.Rotate:
		s.checkRotation(c)
	case runtimetest.Stop:
		s.noteEnd(c.InstanceID, endStop)
	}
	return nil
}

// checkLaunch checks what a container was started with: everything that was
// acknowledged before the old one's end, and nothing that never was.
func (s *scene) checkLaunch(c runtimetest.Call) {
	launches := s.fake.Launches(c.WorkspaceUID)
	launch := launches[len(launches)-1]
	d := s.current()
	if launch.Instance.ID != c.InstanceID || d == nil {
		return
	}
	record, err := d.Store.Workspace(c.WorkspaceID)
	if err != nil || record.UID != c.WorkspaceUID {
		return // killed or deleted just now
	}
	read, before := s.cycles.launched(launch.Instance, s.faults.lateReads())
	s.mu.Lock()
	ended := s.ended[before.ID]
	s.mu.Unlock()

	g := launch.Instance.Generation
	old := record.SpecGeneration > g // prepared from an older spec, or fallen back to one
	s.journal.add("container %s started at generation %d", c.InstanceID, g)
	if floor := read.from.floor; g < floor && !old {
		s.problem("%s was started at generation %d; %d was acknowledged before its values were read", c.InstanceID, g, floor)
	}
	if g > record.Generation {
		s.problem("%s was started at generation %d, there are only %d", c.InstanceID, g, record.Generation)
	}
	if before.Generation == g && ended == endStop && !old {
		s.problem("%s was stopped and %s started in its place at the same generation %d", before.ID, c.InstanceID, g)
	}
	env := envOf(launch.Env)
	if env["WORKSPACE_GENERATION"] != strconv.FormatInt(g, 10) || env["WORKSPACE_UID"] != c.WorkspaceUID || env["WORKSPACE_ID"] != c.WorkspaceID {
		s.problem("%s has %s=%s", c.InstanceID, "WORKSPACE_GENERATION", env["WORKSPACE_GENERATION"])
	}
	if token := env[envToken]; (token != "") != hasAPI(c.WorkspaceID) || token != "" && record.TokenInstance(token) != c.InstanceID {
		s.problem("%s was started with a token of %q", c.InstanceID, record.TokenInstance(token))
	}
	if s.isStable(c.WorkspaceID) {
		files := make(map[string]string)
		for _, f := range launch.Files {
			files[f.Name] = string(f.Data)
		}
		s.checkSecrets(c, env, files, read, old)
	}
}

// checkRotation checks what a running container has taken in: all that was
// acknowledged before it was read, and nothing that never was.
func (s *scene) checkRotation(c runtimetest.Call) {
	read := s.cycles.rotated(c)
	s.journal.add("container %s has taken in generation %d", c.InstanceID, c.Generation)
	if floor := read.from.floor; c.Generation < floor {
		s.problem("%s has taken in generation %d; %d was acknowledged before it was read", c.InstanceID, c.Generation, floor)
	}
	if !s.isStable(c.WorkspaceID) {
		return
	}
	files := s.fake.Files(c.InstanceID)
	for _, key := range fileKeys {
		if !s.appliesLater(c.WorkspaceID, key) { // such a change it does not take in
			s.checkSecret(c, key, files[key], read)
		}
	}
}

// checkSecrets checks a container's secrets against what may be. old: it is made
// from an older spec.
func (s *scene) checkSecrets(c runtimetest.Call, env, files map[string]string, read window, old bool) {
	for _, key := range keys {
		if key == keyModel && (old || s.ledger.mayBe(fieldRegister(c.WorkspaceID, fieldModelEnv), keyModel, read.from.at, read.to, nil)) {
			continue // it may carry the model
		}
		s.checkSecret(c, key, env[key], read)
	}
	for _, key := range fileKeys {
		s.checkSecret(c, key, files[key], read)
		if env[key] != "" {
			s.problem("%s was started with the variable %s, which is a file's", c.InstanceID, key)
		}
	}
}

func (s *scene) checkSecret(c runtimetest.Call, key, value string, read window) {
	l, from, to := s.ledger, read.from.at, read.to
	value = strings.TrimPrefix(value, marker)
	own, global := secretRegister(c.WorkspaceID, key), secretRegister("", key)
	hidden := l.mayBe(own, "", from, to, nil) && l.mayBe(global, value, from, to, nil)
	if !hidden && (value == "" || !l.mayBe(own, value, from, to, nil)) {
		s.problem("%s of %s got %s=%q; %s, %s", c.Method, c.InstanceID, key, value, l.describe(own, from, to), l.describe(global, from, to))
	}
}

func envOf(list []string) map[string]string {
	env := make(map[string]string)
	for _, kv := range list {
		k, v, _ := strings.Cut(kv, "=")
		env[k] = v
	}
	return env
}

// booted checks, after each boot, that everything is there that was acknowledged.
func (s *scene) booted(d *daemon.Daemon) { s.checkStore(d) }

// checkStore checks what is on disk against what may be.
func (s *scene) checkStore(d *daemon.Daemon) {
	for _, id := range slices.Sorted(maps.Keys(s.uids)) {
		now := s.tick()
		sn, err := d.Store.Snapshot(id)
		if err != nil {
			s.problem("workspace %s: %v", id, err)
			continue
		}
		w := &sn.Workspace
		if w.UID != s.uids[id] {
			s.problem("workspace %s has uid %s, it was %s", id, w.UID, s.uids[id])
		}
		if err := s.ledger.told(generationCounter(w.UID), w.Generation, s.ledger.floor(generationCounter(w.UID)), false); err != nil {
			s.problem("on disk: %v", err)
		}
		if w.Status.ObservedGeneration > w.Generation {
			s.problem("%s: observed generation %d of %d", id, w.Status.ObservedGeneration, w.Generation)
		}
		for field, value := range recordFields(w) {
			s.checkRegister("on disk", fieldRegister(id, field), value, now, now)
		}
		merged := make(map[string]string)
		for _, secret := range sn.Secrets {
			merged[secret.Key] = strings.TrimPrefix(secret.Value.Reveal(), marker)
		}
		for _, key := range allKeys {
			s.checkRegister("on disk", secretRegister(id, key), ownValue(d, id, key, merged), now, now)
		}
	}
}

func (s *scene) checkRegister(where, register, value string, from, to int64) {
	if value != notVisible && !s.ledger.mayBe(register, value, from, to, nil) {
		s.problem("%s %s is %q; %s", where, register, value, s.ledger.describe(register, from, to))
	}
}
