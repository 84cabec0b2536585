package sim

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
	"github.com/workspaced/workspaced/runtime"
	"github.com/workspaced/workspaced/server/servertest/internal/daemon"
	"github.com/workspaced/workspaced/store"
)

// checkAll checks everything once all faults have ended and time has passed.
func (s *scene) checkAll() {
	d := s.current()
	if d == nil {
		s.problem("the daemon is down, and nobody ended it")
		return
	}
	s.checkStore(d)
	s.checkGenerations(d)
	for _, check := range []func(*daemon.Daemon) error{s.checkContainers, s.checkLeftovers, s.checkList} {
		if err := check(d); err != nil {
			s.problem("%v", err)
		}
	}
	for _, w := range s.watchers {
		if err := w.check(); err != nil {
			s.problem("%v", err)
		}
	}
	for _, v := range s.fake.Violations() {
		s.problem("the runtime: %s", v)
	}
}

// checkGenerations: each change made one generation, or none.
func (s *scene) checkGenerations(d *daemon.Daemon) {
	for _, id := range s.plan.stable {
		w, err := d.Store.Workspace(id)
		if err != nil {
			continue // checkStore has said so
		}
		if least, most := s.ledger.generations(id); w.Generation < least || w.Generation > most {
			s.problem("%s is at generation %d; by what was answered it is from %d to %d", id, w.Generation, least, most)
		}
	}
}

// checkContainers: what is meant to run runs, with everything that it should
// have, and nothing else does.
func (s *scene) checkContainers(d *daemon.Daemon) error {
	ws, _, err := d.Store.ListWorkspaces("", 0, nil)
	if err != nil {
		return err
	}
	var errs []error
	for i := range ws {
		sn, err := d.Store.Snapshot(ws[i].ID)
		if err == nil {
			err = s.checkContainer(&sn)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", ws[i].ID, err))
		}
	}
	return errors.Join(errs...)
}

func (s *scene) instances(uid string) (list []runtime.Instance) {
	for _, in := range s.fake.Instances() {
		if in.WorkspaceUID == uid {
			list = append(list, in)
		}
	}
	return list
}

func (s *scene) checkContainer(sn *store.Snapshot) error {
	w := &sn.Workspace
	st := &w.Status
	there := s.instances(w.UID)
	switch {
	case w.Deleting != nil:
		return errors.New("is still being deleted")
	case w.Parked || s.isAtEnd(w):
		if len(there) > 0 || st.Running != nil {
			return fmt.Errorf("is not meant to run, and has %v, on record %+v", describe(there), st.Running)
		}
		return nil
	}
	spec, generation := &w.Spec, w.Generation
	if w.Spec.Image == imageBad {
		if st.LastGood == nil {
			if len(there) > 0 {
				return fmt.Errorf("never could run, and has %v", describe(there))
			}
			return nil
		}
		spec, generation = &st.LastGood.Spec, st.LastGood.Generation
		if generation >= w.SpecGeneration {
			return fmt.Errorf("a spec that can't be executed is said to have run: %+v", st)
		}
	}
	if len(there) != 1 || there[0].Phase != runtime.PhaseRunning {
		return fmt.Errorf("has %v, want one that runs; status %+v, failure %+v", describe(there), st, st.Failure)
	}
	in := there[0]
	if st.Running == nil || st.Running.InstanceID != in.ID || st.ObservedGeneration != generation || in.Generation != generation {
		return fmt.Errorf("generation %d should run; %s runs at %d, status %+v", generation, in.ID, in.Generation, st)
	}
	if w.Spec.Image != imageBad && (st.Failure != nil || st.StartingGeneration != 0 || !w.PendingSince.IsZero()) {
		return fmt.Errorf("runs, and the status says otherwise: %+v", st)
	}
	return s.checkEnv(sn, spec, in)
}

// isAtEnd reports whether a workspace's container has ended and is not started
// again: it says so itself, and what the simulation did agrees.
func (s *scene) isAtEnd(w *store.Workspace) bool {
	end := w.End()
	if end == "" || w.NeedsStart() && w.Spec.Image != imageBad {
		return false // a newer one is started, unless it can't be
	}
	last := s.cycles.last(w.UID)
	s.mu.Lock()
	ended := s.ended[last.ID] == endExit
	s.mu.Unlock()
	if !ended || last.Generation != w.Status.ObservedGeneration {
		s.problem("%s is %s, and its last container %s was not ended", w.ID, end, last.ID)
	}
	policy := w.Spec.CrashPolicy
	if end == store.EndExhausted && (policy.MaxRetries == 0 || s.report.Exits <= policy.MaxRetries) {
		s.problem("%s is %s after %d exits, its policy is %+v", w.ID, end, s.report.Exits, policy)
	}
	if end == store.EndExited && policy.Restart == store.CrashRestartAlways {
		s.problem("%s is %s, its policy is %+v", w.ID, end, policy)
	}
	return true
}

// checkEnv: the container has exactly the environment that the record says.
func (s *scene) checkEnv(sn *store.Snapshot, spec *store.Spec, in runtime.Instance) error {
	w := &sn.Workspace
	want := map[string]string{
		"WORKSPACE_ID": w.ID, "WORKSPACE_UID": w.UID, "WORKSPACE_GENERATION": fmt.Sprint(s.startedAt(w.UID, in.ID)),
	}
	wantFiles := make(map[string]string)
	if spec.Image == "a" {
		want["FROM_IMAGE"] = "1"
	}
	for k, v := range spec.Env {
		want[k] = v
	}
	for _, secret := range sn.Secrets {
		if slices.Contains(fileKeys, secret.Key) {
			wantFiles[secret.Key] = secret.Value.Reveal()
		} else {
			want[secret.Key] = secret.Value.Reveal()
		}
	}
	if w.Model != "" {
		for _, k := range spec.ModelVars() {
			want[k] = w.Model
		}
	}
	got := envOf(s.fake.Env(in.ID))
	if spec.WorkspaceAPI != (got[envToken] != "") || spec.WorkspaceAPI && w.TokenInstance(got[envToken]) != in.ID {
		return fmt.Errorf("the token of container %s is that of %q", in.ID, w.TokenInstance(got[envToken]))
	}
	for _, key := range []string{envToken, "WORKSPACE_API"} {
		delete(got, key)
	}
	for _, key := range keys {
		if got[key] != want[key] && s.appliesLater(w.ID, key) {
			delete(got, key)
			delete(want, key)
		}
	}
	for k, v := range want {
		if got[k] != v {
			return fmt.Errorf("%s is %q in container %s, want %q", k, got[k], in.ID, v)
		}
	}
	files := s.fake.Files(in.ID)
	for _, key := range fileKeys {
		if files[key] != wantFiles[key] && !s.appliesLater(w.ID, key) {
			return fmt.Errorf("file %s is %q in container %s, want %q", key, files[key], in.ID, wantFiles[key])
		}
	}
	if len(got) != len(want) {
		return fmt.Errorf("container %s has %d variables, want %d: %v", in.ID, len(got), len(want), got)
	}
	return nil
}

// startedAt returns the generation that an instance was started with.
func (s *scene) startedAt(uid, instance string) int64 {
	for _, l := range s.fake.Launches(uid) {
		if l.Instance.ID == instance {
			return l.Instance.Generation
		}
	}
	return 0
}

// appliesLater reports whether a secret was changed for the next start only.
// What the container has was checked when it was started.
func (s *scene) appliesLater(id, key string) bool {
	if !s.isStable(id) {
		return s.plan.appliesLater(id, key)
	}
	return s.ledger.everNext(secretRegister(id, key)) || s.ledger.everNext(secretRegister("", key))
}

func describe(list []runtime.Instance) (texts []string) {
	for _, in := range list {
		texts = append(texts, fmt.Sprintf("%s %s at generation %d", in.ID, in.Phase, in.Generation))
	}
	return texts
}

// checkLeftovers: nothing is left of what is gone.
func (s *scene) checkLeftovers(d *daemon.Daemon) error {
	var errs []error
	for _, in := range s.fake.Instances() {
		w, err := d.Store.Workspace(in.WorkspaceID)
		if err != nil || w.UID != in.WorkspaceUID {
			errs = append(errs, fmt.Errorf("orphan: %v of %s (uid %s)", describe([]runtime.Instance{in}), in.WorkspaceID, in.WorkspaceUID))
		}
	}
	for _, id := range s.plan.mayflies {
		if _, err := d.Store.Workspace(id); err == nil {
			continue
		}
		if s.fake.HasLog(id) {
			errs = append(errs, fmt.Errorf("%s is deleted, its log is not", id))
		}
		if v := s.fake.Volumes(id); len(v) > 0 && !s.kept(id) {
			errs = append(errs, fmt.Errorf("%s is deleted, its volumes %v are not", id, v))
		}
	}
	return errors.Join(errs...)
}

// kept reports whether somebody wanted the volumes of a workspace to be kept.
func (s *scene) kept(id string) bool {
	for _, ops := range s.plan.clients {
		if slices.ContainsFunc(ops, func(o op) bool { return o.kind == opDelete && o.ws == id && o.keep }) {
			return true
		}
	}
	return false
}

// checkList: callers see what is on disk, each workspace once.
func (s *scene) checkList(d *daemon.Daemon) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	list, err := listWorkspaces(ctx, s.api(0), "", 2)
	if err != nil {
		return fmt.Errorf("list: %w", err)
	}
	records, _, err := d.Store.ListWorkspaces("", 0, nil)
	if err != nil {
		return err
	}
	if len(list) != len(records) {
		return fmt.Errorf("%d workspaces listed, there are %d", len(list), len(records))
	}
	for i, w := range list {
		if w.GetUid() != records[i].UID || w.GetGeneration() != records[i].Generation {
			return fmt.Errorf("%s is listed as %v", records[i].ID, w)
		}
		got, err := s.api(1).GetWorkspace(ctx, &workspacev1.GetWorkspaceRequest{Name: w.GetName()})
		if err != nil || !proto.Equal(got.GetWorkspace(), w) {
			return fmt.Errorf("%s is listed as %v, and read as %v, %w", w.GetName(), w, got, err)
		}
		if s.isStable(records[i].ID) {
			for field, value := range fieldsOf(w) {
				if record := recordFields(&records[i])[field]; record != value {
					return fmt.Errorf("%s of %s is listed as %q, it is %q", field, strings.TrimPrefix(w.GetName(), "workspaces/"), value, record)
				}
			}
		}
	}
	return nil
}
