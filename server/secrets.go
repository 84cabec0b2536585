package server

import (
	"context"
	"fmt"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
	"github.com/workspaced/workspaced/store"
	"github.com/workspaced/workspaced/store/seal"
)

func nextStart(a workspacev1.Apply) bool { return a == workspacev1.Apply_APPLY_NEXT_START }

func live(a workspacev1.Apply) bool { return a == workspacev1.Apply_APPLY_LIVE }

// SetSecret implements workspace.v1.WorkspaceControl.
//
// INVALID_ARGUMENT, NOT_FOUND, ABORTED, FAILED_PRECONDITION, RESOURCE_EXHAUSTED,
// UNAVAILABLE.
func (s *Server) SetSecret(ctx context.Context, req *workspacev1.SetSecretRequest) (*workspacev1.SetSecretResponse, error) {
	scope, key, err := parseSecretName("name", req.GetName())
	if err != nil {
		return nil, err
	}
	o, err := s.options(ctx, workspacev1.WorkspaceControl_SetSecret_FullMethodName, req, req.GetEtag())
	if err != nil {
		return nil, err
	}
	r, err := s.store.UpdateSecrets(ctx, scope, store.SecretsUpdate{
		Set:       []store.SecretValue{{Key: key, Value: seal.New(payloadOf(req)), Delivery: deliveryFromProto(req.GetDelivery())}},
		NextStart: nextStart(req.GetApply()),
		Live:      live(req.GetApply()),
	}, o)
	if err != nil {
		return nil, err
	}
	if len(r.Secrets) != 1 {
		return nil, fmt.Errorf("store answered %d secrets after one was set", len(r.Secrets))
	}
	return &workspacev1.SetSecretResponse{
		Secret:             secretToProto(&r.Secrets[0]),
		Generation:         r.Workspace.Generation,
		Changed:            r.Changed,
		AffectedWorkspaces: int32(r.Affected),
	}, nil
}

// DeleteSecret implements workspace.v1.WorkspaceControl. allow_missing is about
// the secret: a workspace that does not exist is NOT_FOUND all the same.
//
// INVALID_ARGUMENT, NOT_FOUND, ABORTED, FAILED_PRECONDITION, RESOURCE_EXHAUSTED,
// UNAVAILABLE.
func (s *Server) DeleteSecret(ctx context.Context, req *workspacev1.DeleteSecretRequest) (*workspacev1.DeleteSecretResponse, error) {
	scope, key, err := parseSecretName("name", req.GetName())
	if err != nil {
		return nil, err
	}
	o, err := s.options(ctx, workspacev1.WorkspaceControl_DeleteSecret_FullMethodName, req, req.GetEtag())
	if err != nil {
		return nil, err
	}
	r, err := s.store.UpdateSecrets(ctx, scope, store.SecretsUpdate{
		Delete:    []string{key},
		NextStart: nextStart(req.GetApply()),
		Live:      live(req.GetApply()),
		MustExist: !req.GetAllowMissing(),
	}, o)
	if err != nil {
		return nil, err
	}
	return &workspacev1.DeleteSecretResponse{
		Generation:         r.Workspace.Generation,
		Changed:            r.Changed,
		AffectedWorkspaces: int32(r.Affected),
	}, nil
}

// BatchUpdateSecrets implements workspace.v1.WorkspaceControl.
//
// INVALID_ARGUMENT, NOT_FOUND, FAILED_PRECONDITION, RESOURCE_EXHAUSTED,
// UNAVAILABLE.
func (s *Server) BatchUpdateSecrets(ctx context.Context, req *workspacev1.BatchUpdateSecretsRequest) (*workspacev1.BatchUpdateSecretsResponse, error) {
	scope, err := parseParent("parent", req.GetParent())
	if err != nil {
		return nil, err
	}
	o, err := s.options(ctx, workspacev1.WorkspaceControl_BatchUpdateSecrets_FullMethodName, req, "")
	if err != nil {
		return nil, err
	}
	r, err := s.store.UpdateSecrets(ctx, scope, store.SecretsUpdate{
		Set:       secretsFromProto(req.GetSecrets()),
		Delete:    req.GetDeleteKeys(),
		NextStart: nextStart(req.GetApply()),
		Live:      live(req.GetApply()),
	}, o)
	if err != nil {
		return nil, err
	}
	return &workspacev1.BatchUpdateSecretsResponse{
		Secrets:            secretsToProto(r.Secrets),
		Generation:         r.Workspace.Generation,
		Changed:            r.Changed,
		AffectedWorkspaces: int32(r.Affected),
	}, nil
}

// ListSecrets implements workspace.v1.WorkspaceControl.
//
// INVALID_ARGUMENT, NOT_FOUND.
func (s *Server) ListSecrets(_ context.Context, req *workspacev1.ListSecretsRequest) (*workspacev1.ListSecretsResponse, error) {
	scope, err := parseParent("parent", req.GetParent())
	if err != nil {
		return nil, err
	}
	list := []string{"secrets", s.store.InstanceUID(), req.GetParent()}
	after, err := decodeCursor(req.GetPageToken(), list...)
	if err != nil {
		return nil, err
	}
	page, more, err := s.store.ListSecrets(scope, after.ID, pageSize(req.GetPageSize()))
	if err != nil {
		return nil, err
	}
	resp := &workspacev1.ListSecretsResponse{Secrets: secretsToProto(page)}
	if more {
		resp.NextPageToken = encodeToken(cursor{ID: page[len(page)-1].Key}, list...)
	}
	return resp, nil
}

// GetSecret implements workspace.v1.WorkspaceControl.
//
// INVALID_ARGUMENT, NOT_FOUND.
func (s *Server) GetSecret(_ context.Context, req *workspacev1.GetSecretRequest) (*workspacev1.GetSecretResponse, error) {
	scope, key, err := parseSecretName("name", req.GetName())
	if err != nil {
		return nil, err
	}
	secret, err := s.store.Secret(scope, key)
	if err != nil {
		return nil, err
	}
	return &workspacev1.GetSecretResponse{Secret: secretToProto(&secret)}, nil
}
