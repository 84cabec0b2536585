package server

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"go.einride.tech/aip/resourcename"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/types/known/durationpb"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
	"github.com/workspaced/workspaced/server/access"
	"github.com/workspaced/workspaced/store"
)

// ErrorDomain is the domain of every google.rpc.ErrorInfo.
const ErrorDomain = "workspaced"

// Reasons in google.rpc.ErrorInfo.
const (
	ReasonInvalidFields     = "INVALID_FIELDS"
	ReasonRequestIDReused   = "REQUEST_ID_REUSED"
	ReasonWorkspaceNotFound = "WORKSPACE_NOT_FOUND"
	ReasonSecretNotFound    = "SECRET_NOT_FOUND"
	ReasonWorkspaceDeleted  = "WORKSPACE_DELETED"
	ReasonWorkspaceExists   = "WORKSPACE_EXISTS"
	ReasonEtagMismatch      = "ETAG_MISMATCH"
	ReasonWorkspaceStopped  = "WORKSPACE_STOPPED"
	ReasonWorkspaceDeleting = "WORKSPACE_DELETING"
	ReasonWorkspaceFailed   = "WORKSPACE_FAILED"
	ReasonWorkspaceExited   = "WORKSPACE_EXITED"
	ReasonRetriesExhausted  = "RETRIES_EXHAUSTED"
	ReasonStillWaiting      = "STILL_WAITING"
	ReasonModelKey          = "KEY_CARRIES_MODEL"
	ReasonVersionNotFound   = "SECRET_VERSION_NOT_FOUND"
	ReasonVersionCurrent    = "SECRET_VERSION_CURRENT"
	ReasonVersionDisabled   = "SECRET_VERSION_DISABLED"
	ReasonVersionDestroyed  = "SECRET_VERSION_DESTROYED"
	ReasonVersionUnreadable = "SECRET_VERSION_UNREADABLE"
	ReasonNeedsFiles        = "SECRET_NEEDS_FILES"
	ReasonPrivileged        = "PRIVILEGED_NOT_ALLOWED"
	ReasonHostPath          = "HOST_PATH_NOT_ALLOWED"
	ReasonNotLive           = "SECRET_NOT_LIVE"
	ReasonSecretsTooLarge   = "SECRETS_TOO_LARGE"
	ReasonDiskFull          = "DISK_FULL"
	ReasonChangeInDoubt     = "CHANGE_IN_DOUBT"
	ReasonKeySource         = "KEY_SOURCE_UNAVAILABLE"
	ReasonKeysInUse         = "TOO_MANY_KEYS"
	ReasonStorage           = "STORAGE_UNAVAILABLE"
	ReasonDraining          = "DRAINING"
	ReasonInternal          = "INTERNAL"
	ReasonNoCredentials     = "NO_CREDENTIALS"
	ReasonTokenInvalid      = "TOKEN_INVALID"
	ReasonRoleMissing       = "ROLE_MISSING"
	ReasonOutOfScope        = "OUT_OF_SCOPE"
	ReasonNotServed         = "NOT_SERVED"
	ReasonNoContainer       = "NO_CONTAINER"
	ReasonNotOnRecord       = "CONTAINER_NOT_ON_RECORD"
	ReasonSecretUnreadable  = "SECRET_UNREADABLE"
	ReasonTooManyFetches    = "TOO_MANY_FETCHES"
	ReasonRequestTooLarge   = "REQUEST_TOO_LARGE"
	ReasonMalformed         = "MALFORMED_REQUEST"
	ReasonUnknownMethod     = "UNKNOWN_METHOD"
	ReasonTokenNotFound     = "TOKEN_NOT_FOUND"
	ReasonTooManyTokens     = "TOO_MANY_TOKENS"
	ReasonRateLimited       = "RATE_LIMITED"
	ReasonTooManyCalls      = "TOO_MANY_CALLS"
	ReasonTooManyStreams    = "TOO_MANY_STREAMS"
	ReasonQuota             = "QUOTA_EXCEEDED"
)

// How long callers are asked to wait before they try again.
const (
	retryAfterDraining = time.Second
	retryAfterDiskFull = 10 * time.Second
	retryAfterDoubt    = time.Second
	retryAfterKEK      = 10 * time.Second
)

// errDraining ends and refuses what a draining server doesn't do any more.
var errDraining = errors.New("server is draining")

// apiError is an error with everything that the caller gets to see.
type apiError struct {
	code     codes.Code
	reason   string
	message  string
	metadata map[string]string
	details  []protoadapt.MessageV1
}

func (e *apiError) Error() string { return e.message }

// GRPCStatus makes the error a status, with an ErrorInfo before its details
// (AIP-193).
func (e *apiError) GRPCStatus() *status.Status {
	st := status.New(e.code, e.message)
	details := append([]protoadapt.MessageV1{&errdetails.ErrorInfo{
		Reason:   e.reason,
		Domain:   ErrorDomain,
		Metadata: e.metadata,
	}}, e.details...)
	with, err := st.WithDetails(details...)
	if err != nil { // only when a detail can't be marshalled
		return st
	}
	return with
}

// Bounds of what a status says: it travels in the trailers, for which clients
// allow as little as 8 KiB.
const (
	maxViolations       = 12
	maxFieldBytes       = 120
	maxDescriptionBytes = 300
)

// violations collects what is wrong with a request.
type violations struct {
	list    []*errdetails.BadRequest_FieldViolation
	omitted int
}

// add says what would be right. The description never holds a secret's value.
// Only the first violation of a field counts.
func (v *violations) add(field, format string, args ...any) {
	field = shorten(field, maxFieldBytes)
	for _, f := range v.list {
		if f.GetField() == field {
			return
		}
	}
	if len(v.list) == maxViolations {
		v.omitted++
		return
	}
	v.list = append(v.list, &errdetails.BadRequest_FieldViolation{
		Field:       field,
		Description: shorten(fmt.Sprintf(format, args...), maxDescriptionBytes),
	})
}

// shorten also makes the text one that a message can hold.
func shorten(s string, n int) string {
	if len(s) > n {
		s = s[:n-3] + "..."
	}
	return strings.ToValidUTF8(s, "?")
}

// err returns nil when nothing is wrong.
func (v *violations) err() error {
	if len(v.list) == 0 {
		return nil
	}
	message := fmt.Sprintf("invalid %s: %s", v.list[0].GetField(), v.list[0].GetDescription())
	switch {
	case v.omitted > 0:
		message += " (and more than the details name)"
	case len(v.list) > 1:
		message += fmt.Sprintf(" (and %d more, see the details)", len(v.list)-1)
	}
	return &apiError{
		code:    codes.InvalidArgument,
		reason:  ReasonInvalidFields,
		message: message,
		details: []protoadapt.MessageV1{&errdetails.BadRequest{FieldViolations: v.list}},
	}
}

// invalid says what is wrong with one field.
func invalid(field, format string, args ...any) error {
	var v violations
	v.add(field, format, args...)
	return v.err()
}

// publicError turns an error of a handler into what its caller may see; nil
// when that is nothing but an internal error.
func publicError(err error, method string, req any) error {
	var (
		api      *apiError
		notFound *store.NotFoundError
		quota    *store.QuotaError
		total    *store.TotalError
		key      *store.KeyError
		version  *store.VersionError
	)
	var (
		unauthenticated *access.UnauthenticatedError
		denied          *access.DeniedError
	)
	switch {
	case errors.As(err, &api):
		return api
	case errors.As(err, &unauthenticated):
		return unauthenticatedError(unauthenticated)
	case errors.As(err, &denied):
		return deniedError(denied, method)
	case errors.Is(err, store.ErrInDoubt):
		return inDoubtError(err)
	case errors.Is(err, context.DeadlineExceeded):
		return status.Error(codes.DeadlineExceeded, "the deadline has passed")
	case errors.Is(err, context.Canceled):
		return status.Error(codes.Canceled, "the call was cancelled")
	case errors.As(err, &notFound):
		return notFoundError(notFound)
	case errors.Is(err, store.ErrExists):
		return &apiError{
			code:    codes.AlreadyExists,
			reason:  ReasonWorkspaceExists,
			message: fmt.Sprintf("%s already exists", resourceOf(req)),
			details: []protoadapt.MessageV1{&errdetails.ResourceInfo{
				ResourceType: workspaceType,
				ResourceName: resourceOf(req),
				Description:  "the id is taken, or its deletion has not finished",
			}},
		}
	case errors.Is(err, store.ErrEtag):
		return &apiError{
			code:    codes.Aborted,
			reason:  ReasonEtagMismatch,
			message: fmt.Sprintf("the etag is not the current one of %s: read it again", resourceOf(req)),
		}
	case errors.Is(err, store.ErrDeleting):
		return precondition(ReasonWorkspaceDeleting, workspaceOf(req), "is being deleted")
	case errors.Is(err, store.ErrParked):
		return precondition(ReasonWorkspaceStopped, workspaceOf(req), "is stopped; StartWorkspace starts it")
	case errors.Is(err, store.ErrRequestReused):
		e := &apiError{}
		errors.As(invalid("request_id", "must be new: another request was made under it within the last hour"), &e)
		e.reason = ReasonRequestIDReused
		return e
	case errors.As(err, &total):
		return &apiError{
			code:    codes.ResourceExhausted,
			reason:  ReasonQuota,
			message: total.Error(),
			details: []protoadapt.MessageV1{&errdetails.QuotaFailure{
				Violations: []*errdetails.QuotaFailure_Violation{{Subject: total.What, Description: total.Error()}},
			}},
		}
	case errors.As(err, &quota):
		return &apiError{
			code:    codes.ResourceExhausted,
			reason:  ReasonSecretsTooLarge,
			message: scopeName(quota.Scope) + ": " + quota.Error(),
			details: []protoadapt.MessageV1{&errdetails.QuotaFailure{
				Violations: []*errdetails.QuotaFailure_Violation{{
					Subject:     scopeName(quota.Scope),
					Description: quota.Error(),
				}},
			}},
		}
	case errors.As(err, &key) && errors.Is(key.Err, store.ErrModelKey):
		return precondition(ReasonModelKey, workspaceOf(req), fmt.Sprintf("has %s both as a secret's key and in model_env", key.Key))
	case errors.As(err, &key) && errors.Is(key.Err, store.ErrNeedsFiles):
		return precondition(ReasonNeedsFiles, workspaceOf(req),
			fmt.Sprintf("would have %s in the environment, which can't carry its NUL byte: give that secret the delivery SECRET_DELIVERY_FILES", key.Key))
	case errors.As(err, &key) && errors.Is(key.Err, store.ErrNotLive):
		return precondition(ReasonNotLive, workspaceOf(req),
			fmt.Sprintf("has or would have %s as a variable, which no running container can take in: use APPLY_NOW, and once with the delivery SECRET_DELIVERY_FILES to have APPLY_LIVE from then on", key.Key))
	case errors.As(err, &version):
		return versionError(version, req)
	case errors.Is(err, store.ErrDiskFull):
		return &apiError{
			code:    codes.ResourceExhausted,
			reason:  ReasonDiskFull,
			message: "the disk is full: nothing was changed",
			details: []protoadapt.MessageV1{retryInfo(retryAfterDiskFull)},
		}
	case errors.Is(err, store.ErrKEK):
		return &apiError{
			code:    codes.Unavailable,
			reason:  ReasonKeySource,
			message: "what keeps the key that wraps the data keys does not answer, or refuses; nothing was changed: the daemon's log says why",
			details: []protoadapt.MessageV1{retryInfo(retryAfterKEK)},
		}
	case errors.Is(err, store.ErrKeysInUse):
		return precondition(ReasonKeysInUse, "dataKeys", "has as many keys as there can be: wait until earlier rotations are done, see GetServerInfo")
	case errors.Is(err, store.ErrReadOnly), errors.Is(err, store.ErrDamaged):
		return &apiError{
			code:    codes.Unavailable,
			reason:  ReasonStorage,
			message: "the database can't be used as it is, nothing was changed: the daemon's log says why",
			details: []protoadapt.MessageV1{retryInfo(retryAfterDiskFull)},
		}
	case errors.Is(err, errDraining), errors.Is(err, store.ErrClosed):
		return &apiError{
			code:    codes.Unavailable,
			reason:  ReasonDraining,
			message: "the server is shutting down: try again",
			details: []protoadapt.MessageV1{retryInfo(retryAfterDraining)},
		}
	}
	if public := tokenError(err, req); public != nil {
		return public
	}
	if st, ok := status.FromError(err); ok && st.Code() != codes.Unknown && st.Code() != codes.Internal {
		return err // gRPC's own, like that of a Send on a broken connection
	}
	return nil
}

// inDoubtError tells a caller that its change may have been made or not.
func inDoubtError(err error) error {
	e := &apiError{
		code:    codes.Unavailable,
		reason:  ReasonChangeInDoubt,
		message: "the disk failed while the change was written, which may be in force or not: repeat it under the same request_id, or read",
		details: []protoadapt.MessageV1{retryInfo(retryAfterDoubt)},
	}
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		e.code = codes.DeadlineExceeded
		e.message = "the disk did not answer before the deadline; the change may be in force or not: repeat it under the same request_id, or read"
	case errors.Is(err, context.Canceled):
		e.code = codes.Canceled
		e.message = "the call was cancelled while the change was written, which may be in force or not: repeat it under the same request_id, or read"
	}
	return e
}

func notFoundError(e *store.NotFoundError) error {
	reason, kind, name := ReasonWorkspaceNotFound, workspaceType, workspaceName(e.WorkspaceID)
	if e.Key != "" {
		reason, kind, name = ReasonSecretNotFound, secretType, secretName(e.WorkspaceID, e.Key)
	}
	if e.Version != 0 {
		reason, kind, name = ReasonVersionNotFound, versionType, versionName(e.WorkspaceID, e.Key, e.Version)
	}
	return &apiError{
		code:    codes.NotFound,
		reason:  reason,
		message: e.Error(),
		details: []protoadapt.MessageV1{&errdetails.ResourceInfo{
			ResourceType: kind,
			ResourceName: name,
			Description:  "does not exist",
		}},
	}
}

// versionError says what is the matter with the version that a request names.
func versionError(e *store.VersionError, req any) error {
	name := resourceOf(req) // the version's, or the secret's
	if _, _, _, err := parseVersionName("", name); err != nil {
		name += versionsInfix + strconv.FormatInt(e.Version, 10)
	}
	switch {
	case errors.Is(e.Err, store.ErrVersionCurrent):
		return precondition(ReasonVersionCurrent, name, "is the current version, which the next container gets: roll back to another one, set another value, or delete the secret")
	case errors.Is(e.Err, store.ErrVersionDisabled):
		return precondition(ReasonVersionDisabled, name, "is disabled: choose another version, or enable it with EnableSecretVersion")
	case errors.Is(e.Err, store.ErrVersionDestroyed):
		return precondition(ReasonVersionDestroyed, name, "is destroyed, its value is gone: choose another version, or set the value")
	}
	return &apiError{
		code:    codes.DataLoss,
		reason:  ReasonVersionUnreadable,
		message: "the value of " + name + " can't be read any more: choose another version, or set the value",
		details: []protoadapt.MessageV1{&errdetails.ResourceInfo{ResourceType: versionType, ResourceName: name, Description: "can't be read"}},
	}
}

// precondition says which state is in the way: "workspaces/x is ...".
func precondition(reason, name, state string) *apiError {
	return &apiError{
		code:     codes.FailedPrecondition,
		reason:   reason,
		message:  name + " " + state,
		metadata: map[string]string{"resource": name},
		details: []protoadapt.MessageV1{&errdetails.PreconditionFailure{
			Violations: []*errdetails.PreconditionFailure_Violation{{
				Type:        reason,
				Subject:     name,
				Description: state,
			}},
		}},
	}
}

func internalError(callID string) error {
	return &apiError{
		code:    codes.Internal,
		reason:  ReasonInternal,
		message: "internal error; the log tells more under call_id " + callID,
		details: []protoadapt.MessageV1{&errdetails.RequestInfo{RequestId: callID}},
	}
}

func retryInfo(after time.Duration) *errdetails.RetryInfo {
	return &errdetails.RetryInfo{RetryDelay: durationpb.New(after)}
}

// resourceOf is the name of the resource that a request is about.
func resourceOf(req any) string {
	switch req := req.(type) {
	case *workspacev1.CreateWorkspaceRequest:
		return workspaceName(req.GetWorkspaceId())
	case *workspacev1.UpdateWorkspaceRequest:
		return req.GetWorkspace().GetName()
	case interface{ GetName() string }:
		return req.GetName()
	case interface{ GetParent() string }:
		return req.GetParent()
	}
	return ""
}

// workspaceOf is the name of the workspace that a request is about.
func workspaceOf(req any) string {
	name := resourceOf(req)
	if workspace, ok := resourcename.Ancestor(name, workspacePattern); ok {
		return workspace
	}
	return name
}
