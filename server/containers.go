package server

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"golang.org/x/time/rate"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/protobuf/protoadapt"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
	"github.com/workspaced/workspaced/server/access"
	"github.com/workspaced/workspaced/store"
)

// What containers of workspaces call about themselves.

// NewContainerGRPC is NewGRPC for the socket of containers: with only what they
// may call, and tighter limits, since each of them may be hostile. It serves
// listeners of c.Listen and no other.
func (s *Server) NewContainerGRPC(c *access.Containers, options ...grpc.ServerOption) *grpc.Server {
	g := s.newGRPC(append([]grpc.ServerOption{
		grpc.Creds(c.Credentials()),
		grpc.InTapHandle(c.Tap),
		grpc.MaxRecvMsgSize(256 << 10),
		grpc.MaxHeaderListSize(16 << 10),
		grpc.MaxConcurrentStreams(16),
		grpc.ConnectionTimeout(5 * time.Second),
		// One that does nothing is closed: clients connect again when they have to.
		grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionIdle: 5 * time.Minute, Time: time.Minute, Timeout: 20 * time.Second}),
	}, options...))
	workspacev1.RegisterWorkspaceControlServer(registrar{g, s}, s)
	return g
}

// instanceOf is the container that makes the call. W is its workspace. It may have
// ended, or been replaced, since its token was looked at.
func instanceOf(ctx context.Context, w *store.Workspace) (*access.Instance, error) {
	in := access.IdentityOf(ctx).Subject.Instance
	if in == nil {
		return nil, precondition(ReasonNoContainer, workspaceName(w.ID), "is what its own container asks about, with its token, and the caller is none")
	}
	return in, in.Check(w)
}

// Heartbeat implements workspace.v1.WorkspaceControl.
//
// INVALID_ARGUMENT, NOT_FOUND, UNAUTHENTICATED, FAILED_PRECONDITION.
func (s *Server) Heartbeat(ctx context.Context, req *workspacev1.HeartbeatRequest) (*workspacev1.HeartbeatResponse, error) {
	id, err := parseWorkspaceName("name", req.GetName())
	if err != nil {
		return nil, err
	}
	w, err := s.store.Workspace(id)
	if err != nil {
		return nil, err
	}
	in, err := instanceOf(ctx, &w)
	if err != nil {
		return nil, err
	}
	s.containers.beat(id, in.ID)
	resp := &workspacev1.HeartbeatResponse{Generation: w.Generation}
	if r := w.Status.Running; r != nil && r.InstanceID == in.ID {
		resp.ObservedGeneration = w.Status.ObservedGeneration
	}
	return resp, nil
}

// recordWait is how long FetchSecrets waits for a container to be on record: as
// a rule that takes a commit from its start.
const recordWait = 5 * time.Second

// FetchSecrets implements workspace.v1.WorkspaceControl. It is the one RPC that
// returns values, and it fails closed: whatever is not known to be as it has to be
// is an error, and without an entry in the audit log there is no answer.
//
// INVALID_ARGUMENT, NOT_FOUND, UNAUTHENTICATED, FAILED_PRECONDITION,
// RESOURCE_EXHAUSTED, UNAVAILABLE.
func (s *Server) FetchSecrets(ctx context.Context, req *workspacev1.FetchSecretsRequest) (*workspacev1.FetchSecretsResponse, error) {
	id, err := parseWorkspaceName("name", req.GetName())
	if err != nil {
		return nil, err
	}
	in, err := s.awaitRecord(ctx, id)
	if err != nil {
		return nil, err
	}
	if !s.containers.mayFetch(id, in.ID) {
		return nil, tooManyFetches(id)
	}
	sn, err := s.store.Snapshot(id)
	if err != nil {
		return nil, unreadableError(id, err)
	}
	w := &sn.Workspace // as it was when the values were read
	if err := mayHaveValues(w, in); err != nil {
		return nil, err
	}
	resp := &workspacev1.FetchSecretsResponse{Generation: w.Generation, ObservedGeneration: w.Status.ObservedGeneration}
	found := make(map[string]bool)
	for i := range sn.Secrets {
		secret := &sn.Secrets[i]
		if sn.Hidden(&w.Spec, secret.Key) {
			continue
		}
		if len(req.GetKeys()) > 0 && !slices.Contains(req.GetKeys(), secret.Key) {
			continue
		}
		found[secret.Key] = true
		scope := workspacev1.SecretScope_SECRET_SCOPE_WORKSPACE
		if secret.Global {
			scope = workspacev1.SecretScope_SECRET_SCOPE_GLOBAL
		}
		resp.Secrets = append(resp.Secrets, &workspacev1.FetchedSecret{
			Key: secret.Key, Scope: scope, Version: secret.Version, Value: secret.Value.Bytes(),
		})
	}
	for _, key := range req.GetKeys() {
		if !found[key] {
			return nil, &store.NotFoundError{WorkspaceID: id, Key: key}
		}
	}
	if err := s.auditFetch(ctx, workspaceName(id), resp.GetSecrets()); err != nil {
		return nil, err
	}
	return resp, nil
}

// awaitRecord waits until the calling container is on record as the one that runs.
func (s *Server) awaitRecord(ctx context.Context, id string) (*access.Instance, error) {
	hint, stop := s.hub.Watch(id) // before the first read, or a change between is missed
	defer stop()
	timeout := time.NewTimer(s.recordWait)
	defer timeout.Stop()
	for {
		w, err := s.store.Workspace(id)
		if err != nil {
			return nil, err
		}
		in, err := instanceOf(ctx, &w)
		if err != nil {
			return nil, err
		}
		err = mayHaveValues(&w, in)
		if !errors.Is(err, errNotOnRecord) {
			return in, err
		}
		select {
		case <-hint:
		case <-s.draining:
			return nil, errDraining
		case <-timeout.C:
			return nil, err
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// errNotOnRecord: the container has only just started, or its start could not be
// written down.
var errNotOnRecord error = &apiError{
	code: codes.Unavailable, reason: ReasonNotOnRecord, message: "the container is not on record as the one that runs; call again",
	details: []protoadapt.MessageV1{retryInfo(time.Second)},
}

// mayHaveValues returns nil if the instance is the workspace's container, and is to
// run on.
func mayHaveValues(w *store.Workspace, in *access.Instance) error {
	if err := in.Check(w); err != nil {
		return err
	}
	switch r := w.Status.Running; {
	case w.Deleting != nil:
		return precondition(ReasonWorkspaceDeleting, workspaceName(w.ID), "is being deleted")
	case w.Parked:
		return precondition(ReasonWorkspaceStopped, workspaceName(w.ID), "is being stopped")
	case r == nil || r.InstanceID != in.ID:
		return errNotOnRecord
	}
	return nil
}

// unreadableError names the secret that can't be opened: its workspace knows the
// key, and nobody else sees the answer.
func unreadableError(id string, err error) error {
	var key *store.KeyError
	if !errors.As(err, &key) {
		return err
	}
	return precondition(ReasonSecretUnreadable, secretName(id, key.Key), "can't be opened with this daemon's key; set or delete it")
}

// auditFetch writes down, durably, whose values are about to be returned.
func (s *Server) auditFetch(ctx context.Context, resource string, secrets []*workspacev1.FetchedSecret) error {
	e := s.auditEntry(ctx, workspacev1.WorkspaceControl_FetchSecrets_FullMethodName)
	e.Code, e.Resource = codeNames[codes.OK], resource
	for _, secret := range secrets[:min(len(secrets), maxAuditKeys)] {
		e.Keys = append(e.Keys, secret.GetKey())
	}
	if err := s.store.Audit(ctx, e); err != nil {
		return err
	}
	if c, ok := ctx.Value(callKey{}).(*call); ok {
		c.handed = true
	}
	return nil
}

// How often a container may fetch its secrets: each time is a commit, and an entry
// in the audit log, which has an end.
const (
	fetchInterval = 10 * time.Second
	fetchBurst    = 10
)

func tooManyFetches(id string) error {
	message := fmt.Sprintf("more than %d calls at once, and one in %v after that", fetchBurst, fetchInterval)
	return &apiError{
		code: codes.ResourceExhausted, reason: ReasonTooManyFetches, message: message,
		details: []protoadapt.MessageV1{
			&errdetails.QuotaFailure{Violations: []*errdetails.QuotaFailure_Violation{{Subject: workspaceName(id), Description: message}}},
			retryInfo(fetchInterval),
		},
	}
}

// containers is what is known of containers beside what the store knows, while
// this daemon runs: at most twice as many as there are workspaces that have called.
type containers struct {
	gone func(workspaceID string) bool // there is no such workspace any more

	mu    sync.Mutex
	known map[string]*containerState // by workspace id
	prune int                        // as many as there may be before those that are gone go
}

// containerState is what is known of a workspace's container.
type containerState struct {
	instanceID string
	lastBeat   time.Time // of that instance; zero: none
	fetches    *rate.Limiter
}

const prunedContainers = 1024

// of returns the state of the workspace's container. The lock is held.
func (c *containers) of(workspaceID, instanceID string) *containerState {
	st := c.known[workspaceID]
	if st == nil {
		if len(c.known) >= max(prunedContainers, c.prune) {
			maps.DeleteFunc(c.known, func(id string, _ *containerState) bool { return c.gone(id) })
			c.prune = 2 * len(c.known)
		}
		st = &containerState{fetches: rate.NewLimiter(rate.Every(fetchInterval), fetchBurst)}
		c.known[workspaceID] = st
	}
	if st.instanceID != instanceID {
		st.instanceID, st.lastBeat = instanceID, time.Time{}
	}
	return st
}

func (c *containers) beat(workspaceID, instanceID string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.of(workspaceID, instanceID).lastBeat = time.Now()
}

func (c *containers) mayFetch(workspaceID, instanceID string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.of(workspaceID, instanceID).fetches.Allow()
}

// lastBeat is when the container that runs has sent its last heartbeat; zero: it
// has sent none.
func (c *containers) lastBeat(w *store.Workspace) time.Time {
	r := w.Status.Running
	if r == nil || r.TokenHash == "" {
		return time.Time{}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if st := c.known[w.ID]; st != nil && st.instanceID == r.InstanceID {
		return st.lastBeat
	}
	return time.Time{}
}
