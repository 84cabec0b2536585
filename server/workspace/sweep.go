package workspace

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/workspaced/workspaced/runtime"
	"github.com/workspaced/workspaced/store"
)

// SweepInterval is how often Sweep is meant to be called, at once at start first.
const SweepInterval = time.Minute

// sweepConcurrency is how many orphans are removed at once.
const sweepConcurrency = 8

// Sweep looks at everything that the runtime keeps for this daemon. What belongs
// to no workspace is removed; where something belongs to a workspace and should
// not be as it is, its actor is kicked. What is another daemon's, or nobody's, is
// counted in the log and never touched. It ends with Deadlines.Sweep or ctx; the
// error tells what could not be done, of which the next sweep is another try. It
// is called by one goroutine at a time.
func (s *Supervisor) Sweep(ctx context.Context) error {
	if s.draining.Load() {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, s.cfg.Deadlines.Sweep)
	defer cancel()
	foreignErr := s.countForeign(ctx)
	if s.cfg.Store.Revision() == 0 { // nothing can be its own yet
		return foreignErr
	}

	lctx, cancel := context.WithTimeout(ctx, s.cfg.Deadlines.List)
	defer cancel()
	// What could be asked for is swept, whatever could not.
	instances, listErr := s.cfg.Runtime.List(lctx, "")
	homeless, err := s.visit(ctx, instances)
	failed, panics := make([]error, len(homeless)), make([]any, len(homeless))
	var group errgroup.Group
	group.SetLimit(sweepConcurrency) // one that hangs holds up few others
	for i := range homeless {
		group.Go(func() error {
			defer func() { panics[i] = recover() }()
			failed[i] = s.removeOrphan(ctx, &homeless[i])
			return nil
		})
	}
	_ = group.Wait() // each error has its place
	for _, p := range panics {
		if p != nil {
			panic(p) // where Sweep's caller sees it
		}
	}
	return errors.Join(append(failed, foreignErr, listErr, err)...)
}

// countForeign says what the sweep leaves alone, when that has changed.
func (s *Supervisor) countForeign(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, s.cfg.Deadlines.List)
	defer cancel()
	foreign, err := s.cfg.Runtime.Foreign(ctx)
	if err != nil {
		return fmt.Errorf("count the containers of others: %w", err)
	}
	if s.foreign != nil && maps.Equal(foreign, s.foreign) {
		return nil
	}
	s.foreign = foreign
	if s.cfg.Store.Revision() == 0 {
		s.cfg.Logger.InfoContext(ctx, "the database is new: the sweep removes nothing")
	}
	for uid, n := range foreign {
		s.cfg.Logger.WarnContext(ctx, "containers of another daemon, or of none, are left alone", "instance_uid", uid, "containers", n)
	}
	return nil
}

// visit kicks the actors of workspaces that have something to do with what is
// there, and returns what is no workspace's.
func (s *Supervisor) visit(ctx context.Context, instances []runtime.Instance) (homeless []runtime.Instance, err error) {
	byUID := make(map[string][]runtime.Instance)
	for _, in := range instances {
		if in.WorkspaceUID == "" { // whose it is can't be known: not ours to remove
			s.cfg.Logger.WarnContext(ctx, "a container that names no workspace is left alone", "instance", in.ID)
			continue
		}
		byUID[in.WorkspaceUID] = append(byUID[in.WorkspaceUID], in)
	}
	unknown := make(map[string]bool)
	var errs []error
	for uid, own := range byUID {
		ws, err := s.cfg.Store.Workspace(own[0].WorkspaceID)
		switch {
		case errors.Is(err, store.ErrNotFound), err == nil && ws.UID != uid:
			unknown[uid] = true
		case err != nil:
			errs = append(errs, err)
		default:
			s.look(&ws, own)
		}
	}
	if len(unknown) == 0 {
		return nil, errors.Join(errs...)
	}
	// The label may be wrong, or lost with the record: the uid decides.
	ws, _, err := s.cfg.Store.ListWorkspaces("", 0, func(w *store.Workspace) bool { return unknown[w.UID] })
	if err != nil {
		return nil, errors.Join(append(errs, err)...)
	}
	for i := range ws {
		delete(unknown, ws[i].UID)
		s.look(&ws[i], byUID[ws[i].UID])
	}
	for _, in := range instances {
		if unknown[in.WorkspaceUID] {
			homeless = append(homeless, in)
		}
	}
	return homeless, errors.Join(errs...)
}

// look kicks the workspace's actor if it would do something.
func (s *Supervisor) look(ws *store.Workspace, own []runtime.Instance) {
	next := decide(view{ws: ws, instances: own, failure: ws.Status.Failure, maxWait: s.maxWait(), now: s.now()})
	if next.action != actIdle && next.action != actWait {
		s.reach(ws.ID, false)
	}
}

// removeOrphan removes what belongs to no workspace. No actor does: its uid is no
// workspace's, and a uid comes only once.
func (s *Supervisor) removeOrphan(ctx context.Context, in *runtime.Instance) error {
	ctx, cancel := context.WithTimeout(ctx, s.cfg.Deadlines.Remove)
	defer cancel()
	if err := s.cfg.Runtime.Remove(ctx, in.ID); err != nil {
		return fmt.Errorf("remove orphan %s: %w", in.ID, err)
	}
	s.orphans.Add(1)
	s.cfg.Logger.WarnContext(ctx, "removed a container that belongs to no workspace",
		"instance", in.ID, "workspace", in.WorkspaceID, "uid", in.WorkspaceUID, "phase", in.Phase.String())
	return nil
}
