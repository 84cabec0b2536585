package server

import (
	"context"
	"errors"
	"fmt"
	"sort"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/protoadapt"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
	"github.com/workspaced/workspaced/server/access"
	"github.com/workspaced/workspaced/store"
)

// CreateToken implements workspace.v1.AdminControl.
//
// INVALID_ARGUMENT, RESOURCE_EXHAUSTED, UNAVAILABLE.
func (a admin) CreateToken(ctx context.Context, req *workspacev1.CreateTokenRequest) (*workspacev1.CreateTokenResponse, error) {
	ttl := access.DefaultTokenTTL
	if req.GetTtl() != nil {
		ttl = req.GetTtl().AsDuration()
	}
	spec := req.GetToken()
	made, secret, err := a.server.authn.Tokens.Create(ctx, store.Token{
		Subject:    spec.GetSubject(),
		Roles:      access.RoleNames(spec.GetRoles()),
		Workspaces: spec.GetScope().GetWorkspaces(),
		Labels:     cloneMap(spec.GetScope().GetLabels()),
		Creator:    access.SubjectOf(ctx).Name,
	}, ttl, store.Options{
		ValidateOnly: req.GetValidateOnly(),
		Audit:        a.server.handAudit(ctx, workspacev1.AdminControl_CreateToken_FullMethodName, ""),
	})
	if err != nil {
		return nil, err
	}
	return &workspacev1.CreateTokenResponse{Token: tokenToProto(&made), Secret: secret}, nil
}

// checkToken checks what the rules in the .proto can't say of a token.
func checkToken(vs *violations, t *workspacev1.Token) {
	grant := access.Grant{
		Roles: access.RolesOf(t.GetRoles()...),
		Scope: access.Scope{Workspaces: t.GetScope().GetWorkspaces(), Labels: t.GetScope().GetLabels()},
	}
	if err := grant.Check(); err != nil {
		vs.add("token.scope", "must be unset: %v", err)
	}
}

// ListTokens implements workspace.v1.AdminControl.
//
// INVALID_ARGUMENT.
func (a admin) ListTokens(_ context.Context, req *workspacev1.ListTokensRequest) (*workspacev1.ListTokensResponse, error) {
	list := []string{"tokens", a.server.store.InstanceUID()}
	after, err := decodeCursor(req.GetPageToken(), list...)
	if err != nil {
		return nil, err
	}
	all, err := a.server.authn.Tokens.List()
	if err != nil {
		return nil, err
	}
	all = all[sort.Search(len(all), func(i int) bool { return all[i].ID > after.ID }):]
	resp := &workspacev1.ListTokensResponse{}
	if n := pageSize(req.GetPageSize()); len(all) > n {
		all = all[:n]
		resp.NextPageToken = encodeToken(cursor{ID: all[n-1].ID}, list...)
	}
	for i := range all {
		resp.Tokens = append(resp.Tokens, tokenToProto(&all[i]))
	}
	return resp, nil
}

// RevokeToken implements workspace.v1.AdminControl.
//
// INVALID_ARGUMENT, NOT_FOUND, RESOURCE_EXHAUSTED, UNAVAILABLE.
func (a admin) RevokeToken(ctx context.Context, req *workspacev1.RevokeTokenRequest) (*workspacev1.RevokeTokenResponse, error) {
	t, changed, err := a.server.authn.Tokens.Revoke(ctx, strings.TrimPrefix(req.GetName(), access.TokenPrefix), store.Options{
		Audit: a.server.handAudit(ctx, workspacev1.AdminControl_RevokeToken_FullMethodName, req.GetName()),
	})
	if err != nil {
		return nil, err
	}
	return &workspacev1.RevokeTokenResponse{Token: tokenToProto(&t), Changed: changed}, nil
}

func tokenToProto(t *store.Token) *workspacev1.Token {
	grant := access.GrantOf(t)
	return &workspacev1.Token{
		Name:        access.TokenPrefix + t.ID,
		Subject:     t.Subject,
		Roles:       grant.Roles.List(),
		Scope:       scopeToProto(grant.Scope),
		Prefix:      t.Shown,
		Creator:     t.Creator,
		CreateTime:  timeToProto(t.CreateTime),
		ExpireTime:  timeToProto(t.ExpireTime),
		LastUseTime: timeToProto(t.LastUseTime),
		RevokeTime:  timeToProto(t.RevokeTime),
	}
}

// tokenError makes an error about tokens public; nil when it is about none.
func tokenError(err error, req any) error {
	var limit *store.TokenLimitError
	switch {
	case errors.Is(err, store.ErrTokenNotFound):
		return &apiError{
			code:    codes.NotFound,
			reason:  ReasonTokenNotFound,
			message: fmt.Sprintf("%s does not exist", resourceOf(req)),
			details: []protoadapt.MessageV1{&errdetails.ResourceInfo{
				ResourceType: "workspace.v1.Token",
				ResourceName: resourceOf(req),
				Description:  "does not exist, or ended long ago",
			}},
		}
	case errors.As(err, &limit):
		return &apiError{
			code:    codes.ResourceExhausted,
			reason:  ReasonTooManyTokens,
			message: limit.Error(),
			details: []protoadapt.MessageV1{
				&errdetails.QuotaFailure{Violations: []*errdetails.QuotaFailure_Violation{{
					Subject: access.TokenSubject(limit.Subject), Description: limit.Error(),
				}}},
				retryInfo(time.Minute),
			},
		}
	}
	return nil
}
