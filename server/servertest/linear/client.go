package linear

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/google/uuid"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
	"github.com/workspaced/workspaced/server"
)

// Client does operations and records them. One is used by one goroutine at a
// time; any number of them share a connection and a history.
type Client struct {
	API     workspacev1.WorkspaceControlClient
	History *History
	ID      int // names the client in the history
	// Retry, when not 0, makes the client send a change again, under the same
	// request_id and after this long, until it is answered or its context ends.
	Retry time.Duration
}

// Do does an operation, other than a Launch, and records it. The error is what
// the caller was told last; nil when the operation was done.
func (c *Client) Do(ctx context.Context, op Op) (Result, error) {
	call := c.History.Begin(c.ID, op)
	request := ""
	if c.Retry > 0 && op.Kind.changes() {
		request = uuid.NewString()
	}
	doubt := false // an earlier attempt may have done something
	for {
		result, err := c.send(ctx, &op, request)
		if err != nil {
			result.Outcome = outcomeOf(err, &op)
		}
		switch {
		case result.Outcome == Unknown && request != "":
			doubt = true
			timer := time.NewTimer(c.Retry)
			select {
			case <-timer.C:
				continue
			case <-ctx.Done():
				timer.Stop()
			}
		case result.Outcome == refused && !doubt, result.Outcome == refused && !op.Kind.changes():
			call.Drop()
			return result, err
		case err != nil && doubt:
			// This attempt did nothing, an earlier one still may.
			result.Outcome = Unknown
		}
		call.End(result)
		return result, err
	}
}

// refused: nothing was changed, and the model has no word for why.
const refused Outcome = "refused"

// outcomeOf says what an error tells of an operation.
func outcomeOf(err error, op *Op) Outcome {
	st := status.Convert(err)
	reason := ""
	for _, detail := range st.Details() {
		if info, ok := detail.(*errdetails.ErrorInfo); ok && info.GetDomain() == server.ErrorDomain {
			reason = info.GetReason()
		}
	}
	switch reason {
	case server.ReasonSecretNotFound, server.ReasonWorkspaceNotFound:
		return NotFound
	case server.ReasonEtagMismatch:
		return Mismatch
	case server.ReasonWorkspaceStopped:
		return Parked
	case server.ReasonWorkspaceExists:
		return Exists
	case server.ReasonInvalidFields:
		if op.Kind == Wait && op.Generation > 0 {
			return Ahead
		}
		return refused
	case server.ReasonDraining:
		return refused
	}
	switch st.Code() {
	case codes.InvalidArgument, codes.FailedPrecondition, codes.PermissionDenied, codes.Unauthenticated, codes.Unimplemented:
		return refused
	}
	return Unknown
}

// send makes one call.
func (c *Client) send(ctx context.Context, op *Op, request string) (r Result, err error) {
	name := "workspaces/" + op.Workspace
	parent, prefix := name, name+"/"
	if op.Workspace == "" {
		parent, prefix = "global", ""
	}
	switch op.Kind {
	case Create:
		resp, err := c.API.CreateWorkspace(ctx, &workspacev1.CreateWorkspaceRequest{
			WorkspaceId: op.Workspace, RequestId: request, Secrets: secretValues(op.Set),
			Workspace: &workspacev1.Workspace{Spec: &workspacev1.WorkspaceSpec{Image: op.Image}},
		})
		return Result{Generation: resp.GetGeneration(), Changed: resp.GetChanged()}, err
	case Set:
		key, value := only(op.Set)
		resp, err := c.API.SetSecret(ctx, &workspacev1.SetSecretRequest{
			Name: prefix + "secrets/" + key, Payload: &workspacev1.SetSecretRequest_Text{Text: value},
			Apply: apply(op), Etag: etag(op), RequestId: request,
		})
		r := changed(resp)
		if err == nil {
			r.Versions = versions(resp.GetSecret())
		}
		return r, err
	case Delete:
		resp, err := c.API.DeleteSecret(ctx, &workspacev1.DeleteSecretRequest{
			Name: prefix + "secrets/" + op.Delete[0], Apply: apply(op), Etag: etag(op),
			AllowMissing: op.AllowMissing, RequestId: request,
		})
		return changed(resp), err
	case Batch:
		resp, err := c.API.BatchUpdateSecrets(ctx, &workspacev1.BatchUpdateSecretsRequest{
			Parent: parent, Secrets: secretValues(op.Set), DeleteKeys: op.Delete, Apply: apply(op), RequestId: request,
		})
		r := changed(resp)
		r.Versions = versions(resp.GetSecrets()...)
		return r, err
	case Restart:
		resp, err := c.API.RestartWorkspace(ctx, &workspacev1.RestartWorkspaceRequest{Name: name, RequestId: request})
		return Result{Generation: resp.GetGeneration(), Changed: resp.GetChanged()}, err
	case Stop:
		resp, err := c.API.StopWorkspace(ctx, &workspacev1.StopWorkspaceRequest{Name: name, RequestId: request})
		return Result{Generation: resp.GetGeneration(), Changed: resp.GetChanged()}, err
	case Start:
		resp, err := c.API.StartWorkspace(ctx, &workspacev1.StartWorkspaceRequest{Name: name, RequestId: request})
		return Result{Generation: resp.GetGeneration(), Changed: resp.GetChanged()}, err
	case List:
		resp, err := c.API.ListSecrets(ctx, &workspacev1.ListSecretsRequest{Parent: parent, PageSize: 1000})
		if err == nil && resp.GetNextPageToken() != "" {
			err = status.Error(codes.Unimplemented, "linear: more secrets than fit on a page")
		}
		return Result{Versions: versions(resp.GetSecrets()...)}, err
	case Secret:
		resp, err := c.API.GetSecret(ctx, &workspacev1.GetSecretRequest{Name: prefix + "secrets/" + op.Key})
		if err != nil {
			return Result{}, err
		}
		return Result{Versions: versions(resp.GetSecret())}, nil
	case Get:
		resp, err := c.API.GetWorkspace(ctx, &workspacev1.GetWorkspaceRequest{Name: name})
		return looked(resp.GetWorkspace()), err
	case Wait:
		resp, err := c.API.WaitWorkspace(ctx, &workspacev1.WaitWorkspaceRequest{Name: name, Generation: op.Generation})
		return looked(resp.GetWorkspace()), err
	}
	return Result{}, status.Error(codes.Unimplemented, fmt.Sprintf("linear: a client can't do %s", op.Kind))
}

// answer is what the answers to changes of secrets have in common.
type answer interface {
	GetGeneration() int64
	GetChanged() bool
	GetAffectedWorkspaces() int32
}

func changed(a answer) Result {
	return Result{Generation: a.GetGeneration(), Changed: a.GetChanged(), Affected: int(a.GetAffectedWorkspaces())}
}

func looked(w *workspacev1.Workspace) Result {
	return Result{Generation: w.GetGeneration(), Observed: w.GetObservedGeneration(), Parked: w.GetParked()}
}

func versions(secrets ...*workspacev1.Secret) map[string]int64 {
	v := make(map[string]int64)
	for _, s := range secrets {
		v[s.GetKey()] = s.GetVersion()
	}
	return v
}

func secretValues(set map[string]string) []*workspacev1.SecretValue {
	var values []*workspacev1.SecretValue
	for _, key := range slices.Sorted(maps.Keys(set)) {
		values = append(values, &workspacev1.SecretValue{Key: key, Payload: &workspacev1.SecretValue_Text{Text: set[key]}})
	}
	return values
}

func only(set map[string]string) (key, value string) {
	for key, value = range set {
	}
	return key, value
}

func apply(op *Op) workspacev1.Apply {
	if op.NextStart {
		return workspacev1.Apply_APPLY_NEXT_START
	}
	return workspacev1.Apply_APPLY_NOW
}

// etag is the one of a secret's version.
func etag(op *Op) string {
	if op.IfVersion == 0 {
		return ""
	}
	return fmt.Sprintf("%q", fmt.Sprintf("v%d", op.IfVersion))
}
