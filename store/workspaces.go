package store

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"time"

	"github.com/google/uuid"
	bolt "go.etcd.io/bbolt"
)

// NewWorkspace is what CreateWorkspace makes a workspace from.
type NewWorkspace struct {
	ID      string
	Labels  map[string]string
	Spec    Spec
	Model   string
	Secrets []SecretValue // no key twice
}

// Editable is what UpdateWorkspace can change.
type Editable struct {
	Labels map[string]string
	Spec   Spec
	Model  string
}

// mutate is change for what the API asks for: a request that was done before
// gets the same answer again and does nothing.
func (s *Store) mutate(ctx context.Context, opts Options, f func(*txn) (Result, error)) (Result, error) {
	fingerprint := opts.fingerprint()
	audit := changeAudit{opts: &opts}
	result, err := change(ctx, s, opts.ValidateOnly, func(t *txn) (Result, error) {
		if opts.RequestID != "" {
			result, found, err := t.replay(opts.RequestID, fingerprint)
			if err == nil && found {
				audit.note(t, result.Workspace.Generation, AuditRepeated)
			}
			if err != nil || found {
				return result, err
			}
		}
		before := t.totals
		result, err := f(t)
		if err == nil {
			err = s.cfg.Quotas.over(&before, &t.totals)
		}
		if err == nil && opts.RequestID != "" {
			err = t.remember(opts.RequestID, fingerprint, result)
		}
		if err == nil {
			audit.note(t, result.Workspace.Generation, effectOf(result.Changed, &opts))
		}
		return result, err
	})
	if err == nil {
		audit.done(s)
	}
	return result, err
}

// changeAudit makes the entry of a change in the audit log.
type changeAudit struct {
	opts  *Options
	later *AuditEntry // of the last run, if it wrote nothing
}

// note takes down what was done in a transaction.
func (a *changeAudit) note(t *txn, generation int64, effect AuditEffect) {
	if a.later = nil; a.opts.Audit == nil {
		return
	}
	e := *a.opts.Audit
	e.Time, e.Code, e.Effect, e.Generation = t.now, auditOK, effect, generation
	if t.dirty && !a.opts.ValidateOnly {
		t.entries = append(t.entries, e)
	} else {
		a.later = &e
	}
}

// done is called once the transaction has succeeded.
func (a *changeAudit) done(s *Store) {
	if a.later != nil {
		s.AuditLater(*a.later)
	}
}

// auditOK is the code of a call that has not failed.
const auditOK = "OK"

func effectOf(changed bool, opts *Options) AuditEffect {
	switch {
	case opts.ValidateOnly:
		return AuditValidated
	case changed:
		return AuditChanged
	}
	return AuditUnchanged
}

func getWorkspace(tx *bolt.Tx, id string) (Workspace, error) {
	var w Workspace
	if id == "" { // bbolt has no empty keys
		return w, &NotFoundError{}
	}
	found, err := getRecord(tx, bucketWorkspaces, []byte(id), &w)
	if err == nil && !found {
		err = &NotFoundError{WorkspaceID: id}
	}
	if err != nil {
		return w, err
	}
	rollouts, err := rolloutsOf(tx)
	takeIn(tx, &w, rollouts)
	return w, err
}

// editWorkspace returns a workspace that can be changed under the options.
func (t *txn) editWorkspace(id string, opts *Options) (Workspace, error) {
	w, err := getWorkspace(t.Tx, id)
	if err == nil && opts.Allow != nil {
		err = opts.Allow(&w)
	}
	if err == nil && opts.Etag != "" && opts.Etag != w.Etag() {
		err = ErrEtag
	}
	return w, err
}

// putWorkspace stores a changed record under the next revision.
func (t *txn) putWorkspace(w *Workspace, c Change) error {
	// A rollout that the record takes in by this is not told of any more.
	if k, _ := t.Bucket(bucketRollouts).Cursor().Last(); w.Revision != 0 && string(k) > string(number(w.Revision)) {
		c.Desired = true
	}
	revision, err := t.nextRevision(w.Revision, feedRow{ID: w.ID})
	if err != nil {
		return err
	}
	w.Revision = revision
	c.ID, c.UID, c.Revision = w.ID, w.UID, revision
	t.changes = append(t.changes, c)
	b, err := t.encode(w)
	if err != nil {
		return err
	}
	return t.renew(bucketWorkspaces, []byte(w.ID), b) // its revision is a new one
}

// putConfig is putWorkspace for changes that give a new etag.
func (t *txn) putConfig(w *Workspace, c Change) error {
	w.UpdateTime = t.now
	w.ConfigRevision = t.revision + 1
	return t.putWorkspace(w, c)
}

// bump makes a new generation.
func (t *txn) bump(w *Workspace, reason ChangeReason) { bump(w, reason, t.now) }

// bumpLive makes a new generation that a running container takes in.
func bumpLive(w *Workspace, reason ChangeReason, now time.Time) {
	live := w.Live + 1
	bump(w, reason, now)
	w.Live = live
}

func bump(w *Workspace, reason ChangeReason, now time.Time) {
	w.Generation++
	w.Live = 0
	w.ChangeReason = reason
	w.UpdateTime = now
	if w.PendingSince.IsZero() {
		w.PendingSince = now
	}
}

// CreateWorkspace makes a workspace with its first secrets. Errors: ErrExists,
// *KeyError with ErrModelKey or ErrNeedsFiles, *QuotaError, *TotalError,
// ErrRequestReused, ErrDiskFull.
func (s *Store) CreateWorkspace(ctx context.Context, n NewWorkspace, opts Options) (Result, error) {
	n.Labels, n.Spec, n.Secrets = cleanLabels(n.Labels), cleanSpec(n.Spec), slices.Clone(n.Secrets)
	return s.mutate(ctx, opts, func(t *txn) (Result, error) {
		if n.ID == "" {
			return Result{}, fmt.Errorf("store: a workspace needs an id")
		}
		if t.Bucket(bucketWorkspaces).Get([]byte(n.ID)) != nil {
			return Result{}, ErrExists
		}
		if err := t.hasRoom(1); err != nil {
			return Result{}, err
		}
		vars := n.Spec.ModelVars()
		for _, value := range n.Secrets {
			if slices.Contains(vars, value.Key) {
				return Result{}, &KeyError{Key: value.Key, Err: ErrModelKey}
			}
		}
		w := Workspace{
			ID: n.ID, UID: uuid.NewString(), Labels: cleanLabels(n.Labels), Spec: cleanSpec(n.Spec), Model: n.Model,
			SpecGeneration: 1, CreateTime: t.now,
		}
		t.bump(&w, ReasonCreated)
		p, err := t.planSecrets(ownerOf(&w), &w.Spec, &SecretsUpdate{Set: n.Secrets}, "")
		if err != nil {
			return Result{}, err
		}
		if len(n.Secrets) > 0 {
			if err := t.applySecrets(p); err != nil {
				return Result{}, err
			}
		}
		if err := t.putConfig(&w, Change{Desired: true}); err != nil {
			return Result{}, err
		}
		return Result{Workspace: w, Secrets: p.metadata(), Changed: true, Affected: 1}, nil
	})
}

// UpdateWorkspace changes labels, spec and model by edit, which is called inside
// the transaction on a copy, possibly more than once, must be quick and must not
// call the store; its error comes back as it is. A new generation is made when
// something changed that a container sees.
//
// Errors: *NotFoundError, ErrEtag, ErrDeleting, *KeyError with ErrModelKey or
// ErrNeedsFiles, ErrRequestReused, ErrDiskFull.
func (s *Store) UpdateWorkspace(ctx context.Context, id string, edit func(*Editable) error, opts Options) (Result, error) {
	return s.mutate(ctx, opts, func(t *txn) (Result, error) {
		w, err := t.editWorkspace(id, &opts)
		if err != nil {
			return Result{}, err
		}
		if w.Deleting != nil {
			return Result{}, ErrDeleting
		}
		e := Editable{Labels: maps.Clone(w.Labels), Spec: cleanSpec(w.Spec), Model: w.Model}
		if err := edit(&e); err != nil {
			return Result{}, err
		}
		labels, spec := cleanLabels(e.Labels), cleanSpec(e.Spec)
		specChanged := !reflect.DeepEqual(spec, cleanSpec(w.Spec))
		modelChanged := e.Model != w.Model
		if !specChanged && !modelChanged && maps.Equal(labels, w.Labels) {
			return Result{Workspace: w}, nil
		}
		for _, key := range spec.ModelVars() {
			if ownerOf(&w).has(t.Tx, key) {
				return Result{}, &KeyError{Key: key, Err: ErrModelKey}
			}
		}
		if key := binaryKey(t.Tx, &w); key != "" && spec.SecretDelivery != DeliveryFiles {
			return Result{}, &KeyError{Key: key, Err: ErrNeedsFiles}
		}
		result := Result{Changed: true}
		var c Change
		switch {
		case !reflect.DeepEqual(seenByContainer(spec), seenByContainer(w.Spec)):
			t.bump(&w, ReasonSpec)
			w.SpecGeneration = w.Generation
			result.Affected = 1
			c.Desired = true
		case modelChanged:
			t.bump(&w, ReasonModel)
			result.Affected = 1
			c.Desired = true
		case specChanged:
			c.Desired = true // the actor stops or restarts by other rules now
		}
		w.Labels, w.Spec, w.Model = labels, spec, e.Model
		if err := t.putConfig(&w, c); err != nil {
			return Result{}, err
		}
		result.Workspace = w
		return result, nil
	})
}

// binaryKey returns a key of the workspace's own whose value the spec's delivery
// must not put into an environment; "" when there is none.
func binaryKey(tx *bolt.Tx, w *Workspace) (found string) {
	if w.Spec.SecretDelivery != DeliveryFiles {
		return "" // or it could not have been set
	}
	ownerOf(w).each(tx, nil, "", func(key string, r *secretRecord) bool {
		if r.Binary && r.Delivery == "" {
			found = key
		}
		return found == ""
	})
	return found
}

// DeleteWorkspace marks a workspace as being deleted; the actor does the rest.
// It can be repeated; keepVolumes may be taken back by a later call, not given.
// With Options.AllowMissing a workspace that is not there is none in the Result.
// Errors: *NotFoundError, ErrEtag, ErrRequestReused, ErrDiskFull.
func (s *Store) DeleteWorkspace(ctx context.Context, id string, keepVolumes bool, opts Options) (Result, error) {
	return s.mutate(ctx, opts, func(t *txn) (Result, error) {
		w, err := t.editWorkspace(id, &opts)
		if errors.Is(err, ErrNotFound) && opts.AllowMissing {
			return Result{}, nil // and that under its request id
		}
		if err != nil {
			return Result{}, err
		}
		switch {
		case w.Deleting == nil:
			w.Deleting = &Deleting{Time: t.now, KeepVolumes: keepVolumes}
		case w.Deleting.KeepVolumes && !keepVolumes:
			w.Deleting.KeepVolumes = false
		default:
			return Result{Workspace: w}, nil
		}
		if err := t.putConfig(&w, Change{Desired: true, Interrupt: true}); err != nil {
			return Result{}, err
		}
		return Result{Workspace: w, Changed: true}, nil
	})
}

// RestartWorkspace makes a new generation although nothing changed. Errors:
// *NotFoundError, ErrEtag, ErrDeleting, ErrParked, ErrRequestReused,
// ErrDiskFull.
func (s *Store) RestartWorkspace(ctx context.Context, id string, opts Options) (Result, error) {
	return s.mutate(ctx, opts, func(t *txn) (Result, error) {
		w, err := t.editWorkspace(id, &opts)
		switch {
		case err != nil:
			return Result{}, err
		case w.Deleting != nil:
			return Result{}, ErrDeleting
		case w.Parked:
			return Result{}, ErrParked
		}
		t.bump(&w, ReasonRestart)
		if err := t.putWorkspace(&w, Change{Desired: true}); err != nil {
			return Result{}, err
		}
		return Result{Workspace: w, Changed: true, Affected: 1}, nil
	})
}

// StopWorkspace parks a workspace. Errors: *NotFoundError, ErrEtag, ErrDeleting,
// ErrRequestReused, ErrDiskFull.
func (s *Store) StopWorkspace(ctx context.Context, id string, opts Options) (Result, error) {
	return s.mutate(ctx, opts, func(t *txn) (Result, error) {
		w, err := t.editWorkspace(id, &opts)
		switch {
		case err != nil:
			return Result{}, err
		case w.Deleting != nil:
			return Result{}, ErrDeleting
		case w.Parked:
			return Result{Workspace: w}, nil
		}
		w.Parked = true
		if err := t.putConfig(&w, Change{Desired: true, Interrupt: true}); err != nil {
			return Result{}, err
		}
		return Result{Workspace: w, Changed: true}, nil
	})
}

// StartWorkspace ends the parking with a new generation, and likewise the rest of
// a workspace whose crash policy does not start it again. Errors as of
// StopWorkspace.
func (s *Store) StartWorkspace(ctx context.Context, id string, opts Options) (Result, error) {
	return s.mutate(ctx, opts, func(t *txn) (Result, error) {
		w, err := t.editWorkspace(id, &opts)
		switch {
		case err != nil:
			return Result{}, err
		case w.Deleting != nil:
			return Result{}, ErrDeleting
		case !w.Parked && (w.End() == "" || w.Pending()):
			return Result{Workspace: w}, nil
		}
		w.Parked = false
		t.bump(&w, ReasonStart)
		if err := t.putConfig(&w, Change{Desired: true}); err != nil {
			return Result{}, err
		}
		return Result{Workspace: w, Changed: true, Affected: 1}, nil
	})
}

// UpdateStatus lets the workspace's actor write its status by edit, under the
// rules of UpdateWorkspace's edit; w is a copy of the record before. Nothing is
// written when nothing changed. Once the newest generation is observed nothing
// is pending. It returns a *NotFoundError when there is no workspace of that id
// and uid.
func (s *Store) UpdateStatus(ctx context.Context, id, uid string, edit func(w Workspace, st *Status)) (Workspace, error) {
	return change(ctx, s, false, func(t *txn) (Workspace, error) {
		w, err := getWorkspace(t.Tx, id)
		if err == nil && w.UID != uid {
			err = &NotFoundError{WorkspaceID: id}
		}
		if err != nil {
			return Workspace{}, err
		}
		before, err := encodeRecord(&w.Status)
		if err != nil {
			return Workspace{}, err
		}
		observed, pending := w.Status.ObservedGeneration, w.PendingSince
		seen, err := getWorkspace(t.Tx, id) // edit's own, nothing shared
		if err != nil {
			return Workspace{}, err
		}
		edit(seen, &w.Status)

		// What goes on is what is stored: no monotonic clocks, nothing of edit's.
		status := utcStatus(w.Status)
		after, err := encodeRecord(&status)
		if err != nil {
			return Workspace{}, err
		}
		w.Status = Status{}
		if err := decodeRecord(after, &w.Status); err != nil {
			return Workspace{}, err
		}
		switch {
		case w.Status.ObservedGeneration >= w.Generation:
			w.PendingSince = time.Time{}
		case w.Status.ObservedGeneration > observed:
			// What was pending was seen, what came meanwhile was not: it is younger
			// than the snapshot that the container was started from.
			w.PendingSince = t.now
		}
		if string(after) == string(before) && w.PendingSince.Equal(pending) {
			return w, nil
		}
		return w, t.putWorkspace(&w, Change{})
	})
}

// FinishDeletion removes the record and the secrets of a workspace that is being
// deleted; the change feed remembers that it is gone. It can be repeated: no
// workspace of that id and uid is no error.
func (s *Store) FinishDeletion(ctx context.Context, id, uid string) error {
	_, err := change(ctx, s, false, func(t *txn) (struct{}, error) {
		var w Workspace
		found, err := getRecord(t.Tx, bucketWorkspaces, []byte(id), &w)
		if err != nil || !found || w.UID != uid {
			return struct{}{}, err
		}
		if w.Deleting == nil {
			return struct{}{}, fmt.Errorf("store: workspace %q is not being deleted", id)
		}
		if err := t.deleteOwner(ownerOf(&w)); err != nil {
			return struct{}{}, err
		}
		if err := t.delete(bucketWorkspaces, []byte(id)); err != nil {
			return struct{}{}, err
		}
		return struct{}{}, t.putTombstone(&w)
	})
	return err
}
